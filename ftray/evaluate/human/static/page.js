// The rater's side: shows samples, keeps answers, sends each at once. Never learns whose answer is whose.
// What models wrote enters the page as text only (textContent).
"use strict";

const RETRY_MS = 2000;
const find = (id) => document.getElementById(id);
let sheet = null; // {criteria, samples, answers}
let rater = "";
let at = 1; // the sample that is shown, from 1
let cursor = 0; // the score that a digit sets: 2 × criterion + side
const unsent = new Map(); // sample → answer as JSON, in the order in which they were given
let sending = false;

function answer() {
  return (sheet.answers[at] ??= {});
}

function isAnswered(number) {
  return Boolean(sheet.answers[number]?.preferred);
}

function firstOpen() {
  return sheet.samples.findIndex((_, i) => !isAnswered(i + 1)) + 1;
}

async function enter(name) {
  const reply = await fetch(`sheet?rater=${encodeURIComponent(name)}`);
  if (!reply.ok) throw new Error(await reply.text());
  sheet = await reply.json();
  rater = name;
  localStorage.setItem("rater", name);
  find("start").hidden = true;
  for (const id of ["top", "work", "steps"]) find(id).hidden = false;
  find("scores").hidden = sheet.criteria.length === 0;
  find("who").textContent = name;
  buildRubric();
  const asked = Number(location.hash.slice(1));
  show(asked >= 1 && asked <= sheet.samples.length ? asked : firstOpen() || 1);
}

function leave() {
  localStorage.removeItem("rater");
  history.replaceState(null, "", location.pathname);
  location.reload();
}

function buildRubric() {
  find("rubric").replaceChildren(...sheet.criteria.map((name, row) => {
    const line = document.createElement("div");
    line.className = "row";
    const label = document.createElement("span");
    label.textContent = name;
    line.append(label, ...["a", "b"].map((side, column) => {
      const cell = document.createElement("div");
      cell.setAttribute("role", "group");
      cell.setAttribute("aria-label", `${name} of answer ${side.toUpperCase()}`);
      cell.dataset.cell = 2 * row + column;
      const letter = document.createElement("b");
      letter.textContent = side.toUpperCase();
      cell.append(letter, ...[1, 2, 3, 4, 5].map((value) => {
        const button = document.createElement("button");
        button.type = "button";
        button.textContent = value;
        button.dataset.side = side;
        button.dataset.criterion = name;
        button.dataset.value = value;
        button.addEventListener("click", () => {
          cursor = 2 * row + column;
          score(value);
        });
        return button;
      }));
      return cell;
    }));
    return line;
  }));
}

function show(number) {
  at = Math.min(Math.max(number, 1), sheet.samples.length);
  cursor = 0;
  history.replaceState(null, "", `#${at}`); // a reload stays here
  const sample = sheet.samples[at - 1];
  for (const id of ["question", "reference", "a", "b"]) {
    find(id).textContent = sample[id] || "(empty)";
    find(id).classList.toggle("empty", !sample[id]);
  }
  find("more").hidden = !sample.reference;
  find("more").open = false;
  find("back").disabled = at === 1;
  find("next").disabled = at === sheet.samples.length;
  scrollTo(0, 0);
  draw();
}

function draw() {
  const { preferred, a = {}, b = {} } = answer();
  const given = { a, b };
  for (const button of document.querySelectorAll("[data-preferred]")) {
    button.setAttribute("aria-pressed", button.dataset.preferred === preferred);
  }
  for (const button of document.querySelectorAll("[data-criterion]")) {
    const { side, criterion, value } = button.dataset;
    button.setAttribute("aria-pressed", given[side][criterion] === Number(value));
  }
  for (const cell of document.querySelectorAll("[data-cell]")) {
    cell.classList.toggle("here", Number(cell.dataset.cell) === cursor);
  }
  const total = sheet.samples.length;
  const done = sheet.samples.filter((_, i) => isAnswered(i + 1)).length;
  find("place").textContent = `Question ${at} of ${total}`;
  find("count").textContent = done === total ? "· all answered, thank you" : `· ${done} answered`;
  find("bar").value = done / total;
  find("open").hidden = done === total;
}

function prefer(side) {
  answer().preferred = side;
  keep();
}

function score(value) {
  const side = cursor % 2 ? "b" : "a";
  (answer()[side] ??= {})[sheet.criteria[cursor >> 1]] = value;
  if (cursor < 2 * sheet.criteria.length - 1) cursor += 1;
  keep();
}

function keep() {
  unsent.delete(at);
  unsent.set(at, JSON.stringify(answer()));
  draw();
  send();
}

async function send() {
  if (sending) return;
  sending = true;
  while (unsent.size) {
    const [number, body] = unsent.entries().next().value;
    find("saved").textContent = "saving …";
    try {
      const reply = await fetch(`answers/${number}?rater=${encodeURIComponent(rater)}`, { method: "PUT", body });
      if (!reply.ok) throw new Error(await reply.text());
      if (unsent.get(number) === body) unsent.delete(number);
    } catch (problem) {
      find("saved").textContent = "not saved, trying again";
      find("saved").title = problem.message;
      await new Promise((resume) => setTimeout(resume, RETRY_MS));
    }
  }
  find("saved").textContent = "saved";
  find("saved").title = "";
  sending = false;
}

function onKey(event) {
  if (!sheet || event.ctrlKey || event.altKey || event.metaKey || event.target.tagName === "INPUT") return;
  const key = event.key.toLowerCase();
  const last = 2 * sheet.criteria.length - 1;
  if (key === "enter" && event.target.closest("button, summary")) return; // presses what has the focus
  if (key === "a" || key === "b") prefer(key);
  else if (key === "s") prefer("same");
  else if ("12345".includes(key) && last > 0) score(Number(key));
  else if (key === "arrowdown" && last > 0) cursor = Math.min(cursor + 1, last);
  else if (key === "arrowup" && last > 0) cursor = Math.max(cursor - 1, 0);
  else if (key === "arrowright" || key === "enter") show(at + 1);
  else if (key === "arrowleft") show(at - 1);
  else if (key === "r" && !find("more").hidden) find("more").open = !find("more").open;
  else return;
  event.preventDefault();
  draw();
  if ("12345".includes(key) || key === "arrowup" || key === "arrowdown") {
    document.querySelector(".here")?.scrollIntoView({ block: "nearest" });
  }
}

function greet() {
  find("start").hidden = false;
  find("name").focus();
}

find("start").addEventListener("submit", (event) => {
  event.preventDefault();
  enter(find("name").value.trim()).catch((problem) => { find("problem").textContent = problem.message; });
});
for (const button of document.querySelectorAll("[data-preferred]")) {
  button.addEventListener("click", () => prefer(button.dataset.preferred));
}
find("back").addEventListener("click", () => show(at - 1));
find("next").addEventListener("click", () => show(at + 1));
find("open").addEventListener("click", () => show(firstOpen()));
find("leave").addEventListener("click", leave);
document.addEventListener("keydown", onKey);
document.addEventListener("click", (event) => {
  if (event.detail) event.target.closest?.("button, summary")?.blur(); // after the mouse, Enter is for the next question
});
addEventListener("beforeunload", (event) => { if (unsent.size) event.preventDefault(); });

const known = localStorage.getItem("rater");
if (known) enter(known).catch(greet);
else greet();
