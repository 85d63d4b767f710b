// Asks two models the same question and shows both answers as they come. What models say is only ever text (textContent).

const find = (id) => document.getElementById(id);
const sides = [...document.querySelectorAll(".side")].map((section) => ({
  select: section.querySelector("select"),
  turns: section.querySelector(".turns"),
  messages: [],
}));
let running = null;

function headers() {
  const key = find("key").value.trim();
  return { "content-type": "application/json", ...(key ? { authorization: `Bearer ${key}` } : {}) };
}

function problem(text) {
  find("problem").hidden = !text;
  find("problem").textContent = text;
}

function add(parent, kind, text) {
  const element = document.createElement("div");
  element.className = kind;
  element.textContent = text;
  parent.append(element);
  parent.scrollTop = parent.scrollHeight;
  return element;
}

async function why(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `the endpoint answered ${response.status}`;
  }
}

async function listModels() {
  const response = await fetch("v1/models", { headers: headers() });
  if (response.status === 401) {
    find("key-form").hidden = false;
    problem("This endpoint wants an API key.");
    return;
  }
  if (!response.ok) return problem(await why(response));
  problem("");
  const ids = (await response.json()).data.map((model) => model.id);
  sides.forEach(({ select }, side) => {
    const kept = select.value;
    select.replaceChildren(...ids.map((id) => new Option(id, id)));
    select.value = ids.includes(kept) ? kept : ids[Math.min(side, ids.length - 1)];
  });
}

// Server-sent events of one answer, parsed as they arrive.
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    held += value;
    const parts = held.split("\n\n");
    held = parts.pop();
    for (const part of parts) yield part.replace(/^data: /, "");
  }
}

async function answer(side, question, signal) {
  side.messages.push({ role: "user", content: question });
  add(side.turns, "turn user", question);
  const shown = add(side.turns, "turn assistant", "");
  const figures = add(side.turns, "figures", "…");
  const began = performance.now();
  let first = null;
  let usage = null;
  let ended = false;
  let id = null;
  try {
    const response = await fetch("v1/chat/completions", {
      method: "POST",
      headers: headers(),
      signal,
      body: JSON.stringify({
        model: side.select.value,
        messages: side.messages,
        temperature: Number(find("temperature").value),
        max_tokens: Number(find("tokens").value),
        stream: true,
        stream_options: { include_usage: true },
      }),
    });
    if (!response.ok) throw new Error(await why(response));
    for await (const event of events(response.body)) {
      if (event === "[DONE]") {
        ended = true;
        break;
      }
      const chunk = JSON.parse(event);
      if (chunk.error) throw new Error(chunk.error.message);
      id = chunk.id;
      usage = chunk.usage ?? usage;
      const text = chunk.choices[0]?.delta?.content;
      if (text) {
        first ??= performance.now();
        shown.textContent += text;
        side.turns.scrollTop = side.turns.scrollHeight;
      }
    }
    if (!ended) throw new Error("the answer was cut off");
  } catch (error) {
    shown.classList.add("failed");
    shown.textContent += `${shown.textContent ? "\n" : ""}${error.name === "AbortError" ? "stopped" : error.message}`;
    side.messages.pop();
    figures.textContent = "";
    return;
  }
  const seconds = (performance.now() - began) / 1000;
  const parts = [`first text ${first === null ? "–" : Math.round(first - began)} ms`, `${seconds.toFixed(1)} s`];
  if (usage) parts.push(`${usage.completion_tokens} tokens`, `${(usage.completion_tokens / seconds).toFixed(1)}/s`);
  figures.textContent = parts.join(" · ");
  side.messages.push({ role: "assistant", content: shown.textContent });
  const asks = document.body.dataset.feedback === "on"; // an endpoint that keeps no feedback would refuse it
  if (asks && shown.textContent) figures.append(...["up", "down"].map((rating) => opinion(rating, side, figures, id)));
}

function opinion(rating, side, figures, id) {
  const button = document.createElement("button");
  const [model, messages] = [side.select.value, [...side.messages]];
  button.type = "button";
  button.textContent = rating === "up" ? "good" : "bad";
  button.title = "keeps this conversation and your opinion for the next training run";
  button.addEventListener("click", async () => {
    const body = JSON.stringify({ rating, messages, model, id });
    const response = await fetch("v1/feedback", { method: "POST", headers: headers(), body });
    if (!response.ok) return problem(await why(response));
    figures.querySelectorAll("button").forEach((other) => other.remove());
    figures.append(` · kept as ${button.textContent}`);
  });
  return button;
}

find("ask").addEventListener("submit", async (event) => {
  event.preventDefault();
  const question = find("question").value.trim();
  if (!question || running) return;
  running = new AbortController();
  find("question").value = "";
  find("send").disabled = true;
  find("stop").disabled = false;
  await Promise.all(sides.map((side) => answer(side, question, running.signal)));
  running = null;
  find("send").disabled = false;
  find("stop").disabled = true;
  find("question").focus();
});
find("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    find("ask").requestSubmit();
  }
});
find("stop").addEventListener("click", () => running?.abort());
find("clear").addEventListener("click", () => {
  running?.abort();
  sides.forEach((side) => {
    side.messages = [];
    side.turns.replaceChildren();
  });
});
find("key").addEventListener("change", listModels);
find("key-form").addEventListener("submit", (event) => event.preventDefault());
sides.forEach(({ select }) => select.addEventListener("focus", listModels, { once: true }));
setInterval(() => document.activeElement?.tagName !== "SELECT" && listModels().catch(() => {}), 10_000);
listModels().catch((error) => problem(error.message));
