// The REST interface, from its OpenAPI description.

import { $, h } from "./dom.js";
import { get } from "./api.js";

const described = await get("/openapi.json");
const resolve = (schema) => (schema?.$ref ? described.components.schemas[schema.$ref.split("/").pop()] : schema);

function kind(schema) {
  if (schema.anyOf) return schema.anyOf.map(kind).join(" or ");
  if (schema.const !== undefined) return JSON.stringify(schema.const);
  if (schema.enum) return schema.enum.map((each) => JSON.stringify(each)).join(" or ");
  return schema.$ref ? schema.$ref.split("/").pop() : schema.format || schema.contentMediaType || schema.type || "any";
}

function fields(schema, path) {
  const whole = resolve(schema), required = new Set(whole.required || []);
  const rows = Object.entries(whole.properties || {}).map(([name, each]) => h("tr", {},
    h("td", {}, h("code", { textContent: name })), h("td", { textContent: kind(each) }),
    h("td", { textContent: required.has(name) ? "required" : JSON.stringify(each.default) }), h("td", { textContent: each.description || "" })));
  const head = h("tr", {}, ...["field", "type", "default", "meaning"].map((name) => h("th", { scope: "col", textContent: name })));
  return h("div", { className: "scroll", tabIndex: 0, role: "region", "aria-label": `fields of ${path}` }, h("table", {}, h("thead", {}, head), h("tbody", {}, ...rows)));
}

const shown = [h("p", { textContent: described.info.description })];
for (const [path, methods] of Object.entries(described.paths))
  for (const [method, operation] of Object.entries(methods)) {
    shown.push(h("h2", { textContent: `${method.toUpperCase()} ${path}` }), h("p", { textContent: operation.description || operation.summary }));
    const content = operation.requestBody?.content;
    if (content) shown.push(fields(Object.values(content)[0].schema, path));
    if (operation.parameters) shown.push(h("p", { className: "mute", textContent: operation.parameters.map((each) => `${each.name} (in the ${each.in})`).join(", ") }));
  }
$("operations").replaceChildren(h("div", {}, ...shown));
$("operations").style.display = "block";
