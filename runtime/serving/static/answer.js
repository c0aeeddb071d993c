// An answer in the conversation: its tokens, coloured by pass, and what is told of it. Text goes in as text alone.

import { count, element, seconds } from "./format.js";
import { HUES, Run } from "./run.js";

/** One way of decoding an answer, in a column of its own. `show` is called with a pass to be shown, by its step. */
export class Column {
  constructor(speculate, show) {
    this.run = new Run(speculate);
    this.show = show;
    this.selected = -1;
    this.spans = [];
    this.length = 0;
    this.text = element("div", {
      className: "text",
      attributes: { role: "group", "aria-label": "Answer; arrow keys step through its passes", "aria-busy": "true" },
    });
    this.stats = element("p", { className: "stats" });
    this.name = element("h3", { className: "way", textContent: speculate ? "Speculative" : "Plain", hidden: true });
    this.element = element("div", { className: "column" }, this.name, this.text, this.stats);
    this.listen();
  }

  /** Take a choice of a chunk. */
  take(choice) {
    for (const pass of this.run.take(choice)) this.append(pass);
    // What a deadline let out at the end belongs to no pass.
    const rest = this.run.text.slice(this.length);
    if (rest) this.text.append(rest);
    this.length += rest.length;
    this.tell();
  }

  append(pass) {
    const step = this.spans.length;
    const spans = pass.tokens.map((token, place) => {
      const draft = place < pass.tokens.length - 1;
      const span = element("span", {
        className: `token hue-${step % HUES} ${draft ? "draft" : "own"}`,
        textContent: token.adds,
        tabIndex: step || place ? -1 : 0,
      });
      span.dataset.step = step;
      return span;
    });
    this.spans.push(spans);
    this.length += spans.reduce((sum, span) => sum + span.textContent.length, 0);
    const visible = spans.filter((span) => span.textContent);
    visible.at(0)?.classList.add("first");
    visible.at(-1)?.classList.add("last");
    // White space in front of a pass parts it from the one before: it has no colour.
    const [, space, word] = /^(\s*)(.*)$/s.exec(visible.at(0)?.textContent ?? "");
    if (space && word) {
      visible[0].textContent = word;
      this.text.append(space);
    }
    this.text.append(...spans);
  }

  tell() {
    const { tokens, steps, perStep, perSecond, first } = this.run.stats;
    if (!tokens) return;
    const told = [
      count(tokens, "token"),
      count(steps, "pass", "passes"),
      `${perStep.toFixed(2)} tokens per step`,
      ...(perSecond ? [`${perSecond.toFixed(1)} tokens/s`] : []),
      `first token after ${seconds(first)}`,
    ];
    this.stats.replaceChildren(...told.map((one) => element("span", { textContent: one })));
  }

  /** The answer has ended; `note` says how, where that is worth a word. */
  end(note = "") {
    this.text.setAttribute("aria-busy", "false");
    if (note) this.stats.append(element("span", { className: "note", textContent: note }));
  }

  /** Mark the pass of this step, and with `focus` go there. */
  select(step, { focus = false } = {}) {
    for (const span of this.spans[this.selected] ?? []) span.classList.remove("on");
    this.selected = step;
    const spans = this.spans[step] ?? [];
    for (const span of spans) span.classList.add("on");
    if (focus && spans.length) this.focus(spans.find((span) => span.textContent) ?? spans[0]);
  }

  focus(span) {
    for (const other of this.text.querySelectorAll('[tabindex="0"]')) other.tabIndex = -1;
    span.tabIndex = 0;
    span.focus({ preventScroll: true });
    span.scrollIntoView({ block: "nearest" });
  }

  listen() {
    const step = (event) => event.target.closest?.(".token")?.dataset.step;
    this.text.addEventListener("pointerover", (event) => {
      if (event.pointerType === "mouse" && step(event) !== undefined) this.show(this, Number(step(event)), "hover");
    });
    this.text.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && this.show(this, null, "hover"));
    this.text.addEventListener("click", (event) => {
      if (step(event) === undefined) return;
      this.focus(event.target.closest(".token"));
      this.show(this, Number(step(event)), "click");
    });
    this.text.addEventListener("focusin", (event) => {
      if (step(event) !== undefined) this.show(this, Number(step(event)), "focus");
    });
    this.text.addEventListener("keydown", (event) => {
      if (event.altKey || event.ctrlKey || event.metaKey) return;
      const at = Number(step(event));
      const last = this.spans.length - 1;
      const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: last }[event.key];
      if (to === undefined || Number.isNaN(at)) return;
      event.preventDefault();
      this.show(this, Math.min(last, Math.max(0, to)), "keys");
    });
  }
}

/** Where two texts part: the number of characters that they have in common, or null where they are the same. */
export function parting(one, other) {
  if (one === other) return null;
  let place = 0;
  while (place < one.length && one[place] === other[place]) place += 1;
  return place;
}

/** What came of decoding the same request both ways: times, speed-up, and whether the texts are the same. */
export function verdict(speculative, plain) {
  const times = [speculative.decoding, plain.decoding];
  const most = Math.max(...times);
  const bar = (run, name) =>
    element(
      "div",
      { className: `race ${run.speculate ? "speculative" : "plain"}` },
      element("span", { className: "name", textContent: name }),
      lengthOf(run.decoding / most),
      element("span", { className: "time", textContent: seconds(run.decoding) }),
      element("span", { className: "rate", textContent: `${run.stats.perSecond.toFixed(1)} tokens/s` }),
    );
  const place = parting(speculative.text, plain.text);
  const same = element("span", {
    className: place === null ? "same" : "other",
    textContent: place === null ? "✓ Same text" : `✗ Texts part at character ${place + 1}`,
  });
  const factor = times[0] > 0 ? times[1] / times[0] : 0;
  return element(
    "section",
    { className: "verdict", attributes: { "aria-label": "Speculative against plain decoding" } },
    element(
      "p",
      { className: "headline" },
      element("strong", { textContent: `${factor.toFixed(2)}×` }),
      element("span", { textContent: "the speed of plain decoding" }),
      same,
    ),
    bar(speculative, "Speculative"),
    bar(plain, "Plain"),
    element("p", {
      className: "hint",
      textContent:
        "From the first token to the last, one after the other, so that they do not share the machine. The prompt is left out: the second finds it cached.",
    }),
  );
}

function lengthOf(share) {
  const bar = element("span", { className: "length" }, element("span"));
  bar.firstChild.style.width = `${Math.max(1, 100 * share)}%`;
  return bar;
}
