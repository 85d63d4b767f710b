// Shows openapi.json as a page: paths, and for each body its fields.

const api = await (await fetch("openapi.json")).json();
const page = document.getElementById("paths");

function add(parent, tag, text) {
  const element = document.createElement(tag);
  element.textContent = text;
  parent.append(element);
  return element;
}

function words(schema) {
  if (schema.$ref) return schema.$ref.split("/").pop();
  if (schema.anyOf) return schema.anyOf.map(words).join(" or ");
  if (schema.const !== undefined) return JSON.stringify(schema.const);
  if (schema.enum) return schema.enum.map((value) => JSON.stringify(value)).join(" or ");
  const bounds = ["minimum", "maximum", "exclusiveMinimum", "minLength", "maxLength", "minItems", "maxItems"];
  const told = bounds.filter((name) => name in schema).map((name) => `${name} ${schema[name]}`);
  const kind = schema.type === "array" ? `array of ${words(schema.items ?? {})}` : (schema.type ?? "anything");
  return told.length ? `${kind} (${told.join(", ")})` : kind;
}

function table(schema) {
  const rows = add(page, "table", "");
  for (const [name, field] of Object.entries(schema.properties ?? {})) {
    const row = add(rows, "tr", "");
    add(row, "td", name);
    add(row, "td", words(field));
    add(row, "td", schema.required?.includes(name) ? "required" : "");
  }
}

for (const [path, methods] of Object.entries(api.paths)) {
  for (const [method, told] of Object.entries(methods)) {
    add(page, "h2", `${method.toUpperCase()} ${path}`);
    add(page, "p", `${told.summary}. Statuses: ${Object.keys(told.responses).join(", ")}.`);
    const body = told.requestBody?.content["application/json"].schema;
    if (body) table(api.components.schemas[words(body)]);
  }
}
for (const name of ["ChatMessage", "TextPart", "StreamOptions"]) {
  add(page, "h2", name);
  table(api.components.schemas[name]);
}
