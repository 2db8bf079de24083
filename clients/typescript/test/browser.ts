/** What `tests/test_typescript_browser.py` calls in a browser's page. */
import * as vs from "../src/web.js";
import { collect, refusal } from "./calls.js";

Object.assign(globalThis, { vs, collect, refusal });
