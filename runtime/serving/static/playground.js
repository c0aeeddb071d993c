// The playground: a conversation with the model, and the passes that its answers came by.

import { Column, verdict } from "./answer.js";
import { ApiProblem, chat, models } from "./api.js";
import { element } from "./format.js";
import { Inspector } from "./inspector.js";
import { asked, key, showModels, system } from "./options.js";

const EXAMPLES = [
  ["Explain", "Explain in a few sentences why the sky is blue and sunsets are red."],
  ["Code", "Write a Python function that returns the n-th Fibonacci number, with a docstring."],
  ["List", "List ten animals with one short sentence about each."],
  ["Rewrite", "Rewrite this text with a capital letter at the start of each sentence: the ship left at dawn. the sea was calm. the captain was asleep. nobody woke the captain."],
];

const find = (id) => document.getElementById(id);
const prompt = find("prompt");
const conversation = find("conversation");
const scroller = find("scroller");

let history = [];
let running = null;
// The pass that is shown when nothing is pointed at: of the column, its step.
let pinned = null;

// Passes.

const inspector = new Inspector((step) => {
  if (inspector.column) show(inspector.column, step, "panel");
});

/** Show a pass: while it is pointed at ("hover", null at its end), or until another one is chosen. */
function show(column, step, how) {
  if (how === "hover") {
    const at = step === null ? pinned : { column, step };
    if (step === null) column.select(-1);
    if (at) mark(at);
    return;
  }
  const last = column.run.steps.length - 1;
  pinned = { column, step: Math.min(last, Math.max(0, step)) };
  mark(pinned);
  if (how === "keys") column.select(pinned.step, { focus: true });
  if (how === "click") inspector.open();
}

let marked = null;
function mark({ column, step }) {
  if (marked && marked !== column) marked.select(-1);
  marked = column;
  column.select(step);
  inspector.show(column, step);
}

// Conversation.

function tell(text) {
  find("status").textContent = text;
}

/** Keep the end in sight, unless the reader has scrolled away from it. */
function following(work) {
  const near = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 80;
  work();
  if (near) scroller.scrollTop = scroller.scrollHeight;
}

function problem(error, where) {
  const status = error instanceof ApiProblem && error.status ? `${error.status}: ` : "";
  const line = element("p", { className: "problem", textContent: status + error.message, attributes: { role: "alert" } });
  following(() => where.append(line));
  if (error.status === 401) askForKey();
}

/** Answer by one way of decoding into `column`; the panel turns to it unless it is `quiet`. */
async function decode(body, column, signal, { quiet = false } = {}) {
  for await (const event of chat(body, key.get(), signal)) {
    following(() => {
      for (const choice of event.choices) column.take(choice);
    });
  }
  const { finish } = column.run;
  const most = body.max_tokens ? `ended after ${body.max_tokens} tokens, as asked` : "ended at the context limit";
  column.end([body.temperature !== 0 && `seed ${body.seed}`, finish === "length" && most].filter(Boolean).join(", "));
  if (!quiet && pinned?.column !== column) {
    // The richest pass, to begin with.
    const sizes = column.run.steps.map((pass) => pass.tokens.length);
    if (sizes.length) show(column, sizes.indexOf(Math.max(...sizes)), "end");
  }
}

/** Do `work`, which fills `column` and may be stopped; tell `where` what went wrong. Return whether it is whole. */
async function guarded(work, where, column) {
  const control = new AbortController();
  running = control;
  setBusy(true);
  try {
    await work(control.signal);
    tell("The answer is complete.");
    return true;
  } catch (error) {
    const stopped = control.signal.aborted;
    column.end(stopped ? "stopped" : "");
    if (!stopped) problem(error, where);
    tell(stopped ? "Stopped." : "");
    return false;
  } finally {
    running = null;
    setBusy(false);
  }
}

async function send(content) {
  let options;
  const message = element("article", { className: "message user" }, element("p", { textContent: content }));
  const answer = element("article", { className: "message answer" });
  find("welcome").hidden = true;
  conversation.append(message, answer);
  scroller.scrollTop = scroller.scrollHeight;
  try {
    options = asked();
  } catch (error) {
    problem(error, answer);
    return;
  }
  const body = { ...options, messages: [...system(), ...history, { role: "user", content }] };
  const columns = element("div", { className: "columns" });
  const column = new Column(body.speculate, show);
  columns.append(column.element);
  answer.append(columns);
  tell("Answering.");
  const whole = await guarded((signal) => decode(body, column, signal), answer, column);
  // A new chat has begun meanwhile.
  if (!answer.isConnected) return;
  if (column.run.tokens) {
    history.push({ role: "user", content }, { role: "assistant", content: column.run.text });
    if (whole && find("compare").checked) await compare(body, column, answer);
    else if (whole) answer.append(actions(body, column, answer));
  } else {
    columns.remove();
    if (!prompt.value) fill(content);
  }
  prompt.focus();
}

/** Run the same request by the other way of decoding beside the answer, and compare. */
async function compare(body, column, answer) {
  const other = new Column(!body.speculate, show);
  const columns = answer.querySelector(".columns");
  column.name.hidden = other.name.hidden = false;
  columns.classList.add("two");
  columns.append(other.element);
  tell(`Answering again, ${body.speculate ? "plainly" : "speculatively"}.`);
  const same = { ...body, speculate: !body.speculate };
  const whole = await guarded((signal) => decode(same, other, signal, { quiet: true }), answer, other);
  if (!whole) return;
  const [speculative, plain] = body.speculate ? [column.run, other.run] : [other.run, column.run];
  following(() => answer.append(verdict(speculative, plain)));
}

function actions(body, column, answer) {
  const name = body.speculate ? "Compare with plain decoding" : "Compare with speculative decoding";
  const button = element("button", { type: "button", className: "small", textContent: name });
  const row = element("div", { className: "after" }, button);
  button.addEventListener("click", () => {
    if (running) return;
    row.remove();
    compare(body, column, answer).then(() => prompt.focus());
  });
  return row;
}

function setBusy(busy) {
  find("stop").hidden = !busy;
  find("send").hidden = busy;
  document.body.classList.toggle("busy", busy);
}

// Controls.

function fill(content) {
  prompt.value = content;
  grow();
}

function grow() {
  prompt.style.height = "auto";
  prompt.style.height = `${Math.min(prompt.scrollHeight, 240)}px`;
}

function submit() {
  const content = prompt.value;
  if (running || !content.trim()) return;
  fill("");
  send(content);
}

function askForKey() {
  find("key-field").hidden = false;
  showOptions(true);
  find("key").focus();
}

function showOptions(shown) {
  find("options").classList.toggle("open", shown);
  find("show-options").setAttribute("aria-expanded", String(shown));
}

const THEMES = { "": "as the system", light: "light", dark: "dark" };

function setTheme(theme) {
  if (theme) document.documentElement.dataset.theme = theme;
  else delete document.documentElement.dataset.theme;
  sessionStorage.setItem("theme", theme);
  find("theme").setAttribute("aria-label", `Theme: ${THEMES[theme]}`);
  find("theme").title = `Theme: ${THEMES[theme]}`;
}

async function begin() {
  try {
    showModels(await models(key.get()));
    find("key-field").hidden = !key.get();
  } catch (error) {
    if (error.status === 401) {
      askForKey();
      if (key.get()) problem(error, conversation);
    } else problem(error, conversation);
  }
}

find("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  submit();
});
prompt.addEventListener("input", grow);
prompt.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  submit();
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  if (running) running.abort();
  else if (find("inspector").classList.contains("open")) inspector.close();
  else if (find("options").classList.contains("open")) {
    showOptions(false);
    find("show-options").focus();
  }
});
find("stop").addEventListener("click", () => running?.abort());
find("new").addEventListener("click", () => {
  running?.abort();
  history = [];
  pinned = marked = null;
  conversation.replaceChildren();
  find("welcome").hidden = false;
  inspector.clear();
  tell("");
  prompt.focus();
});
find("show-options").addEventListener("click", () => showOptions(!find("options").classList.contains("open")));
find("theme").addEventListener("click", () => {
  const order = Object.keys(THEMES);
  setTheme(order[(order.indexOf(document.documentElement.dataset.theme ?? "") + 1) % order.length]);
});
find("options-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key.set(find("key").value.trim());
  conversation.querySelector(":scope > .problem")?.remove();
  begin().then(() => prompt.focus());
});
find("model-choice").addEventListener("change", (event) => (find("model").textContent = event.target.value));
find("examples").append(
  ...EXAMPLES.map(([name, content]) => {
    const button = element("button", { type: "button" }, element("strong", { textContent: name }), element("span", { textContent: content }));
    button.addEventListener("click", () => {
      fill(content);
      submit();
    });
    return element("li", {}, button);
  }),
);
setTheme(document.documentElement.dataset.theme ?? "");
setBusy(false);
find("key").value = key.get();
begin().then(() => matchMedia("(pointer: fine)").matches && find("key-field").hidden && prompt.focus());
