/** Look inside a vision-language model that runs behind a VLM Spectra server, from Node. */
export * from "./api.js";
export { connect, type ConnectOptions, type KeepAlive, type Tls } from "./node.js";
