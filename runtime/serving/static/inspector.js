// The panel that shows one pass of an answer: its tree, its numbers, and where it stands among the others.

import { count, drawn, element, percent, visible } from "./format.js";
import { HUES } from "./run.js";
import { EXAMPLE } from "./example.js";
import { boxesOf, drawTree, mark } from "./tree.js";

const find = (id) => document.getElementById(id);

export class Inspector {
  /** `go` is called with the step that is asked for in the panel itself. */
  constructor(go) {
    this.go = go;
    this.column = null;
    this.step = -1;
    find("previous").addEventListener("click", () => go(this.step - 1));
    find("next").addEventListener("click", () => go(this.step + 1));
    find("close").addEventListener("click", () => this.close());
    this.tape = find("tape");
    this.tape.addEventListener("click", (event) => {
      const step = event.target.closest?.("[data-step]")?.dataset.step;
      if (step !== undefined) go(Number(step));
    });
    this.clear();
  }

  /** On a narrow screen the panel is a sheet: open it. */
  open() {
    find("inspector").classList.add("open");
  }

  close() {
    find("inspector").classList.remove("open");
    this.column?.text.querySelector('[tabindex="0"]')?.focus();
  }

  /** Nothing to show any more. */
  clear() {
    this.column = null;
    this.step = -1;
    find("inspector").classList.remove("open");
    for (const id of ["steps", "tape", "table"]) find(id).hidden = true;
    find("pass-title").textContent = "A pass, for example";
    find("pass").replaceChildren(
      element("p", { className: "big", textContent: "3 tokens from one pass" }),
      element(
        "p",
        { className: "hint" },
        "Drafts branch where more than one token may follow. The model checks all of them at once; the path that it confirms is the text, and it adds a token of its own. Point at a token of an answer, or go there and press ",
        element("kbd", { textContent: "←" }),
        " and ",
        element("kbd", { textContent: "→" }),
        ".",
      ),
    );
    this.draw(EXAMPLE, 0);
  }

  /** Draw the tree of a pass, and name its sources. */
  draw(pass, hue) {
    const about = { role: "region", "aria-label": "The tree" };
    const scroll = element("div", { className: "scroll", tabIndex: 0, attributes: about }, drawTree(pass, hue));
    find("tree").replaceChildren(scroll);
    find("tree").hidden = false;
    const names = new Set(["transfer layers", "text", ...pass.nodes.flatMap((node) => node.sources)]);
    find("sources").replaceChildren(...[...names].map((name) => element("span", {}, mark(name), name)));
  }

  /** Show the pass of this step of a column. */
  show(column, step) {
    const steps = column.run.steps;
    const pass = steps[step];
    if (!pass) return;
    const changed = column !== this.column || step !== this.step || this.known !== steps.length;
    if (!changed) return;
    Object.assign(this, { column, step, known: steps.length });
    find("pass-title").textContent = `Pass ${step + 1} of ${steps.length}`;
    find("previous").disabled = step === 0;
    find("next").disabled = step === steps.length - 1;
    find("pass").replaceChildren(...(pass.prompt ? this.ofPrompt(pass) : this.ofTree(pass)));
    for (const id of ["steps", "tape"]) find(id).hidden = false;
    for (const id of ["tree", "table"]) find(id).hidden = pass.prompt;
    this.drawTape(steps);
    if (!pass.prompt) {
      this.draw(pass, step % HUES);
      find("table").querySelector(".scroll").replaceChildren(tableOf(pass));
    }
  }

  ofPrompt(pass) {
    const rows = this.column.run.passes.filter((one) => one.prompt);
    const tokens = rows.reduce((sum, one) => sum + one.rows, 0);
    const took = rows.reduce((sum, one) => sum + one.seconds, 0);
    return [
      element("p", { className: "big", textContent: "The prompt" }),
      element("p", {
        className: "numbers",
        textContent: `${count(tokens, "token")} in ${count(rows.length, "pass", "passes")}, ${(1000 * took).toFixed(0)} ms`,
      }),
      element("p", {
        className: "hint",
        textContent: `No tree yet: the model read what was not cached, chose ${JSON.stringify(pass.tokens[0].text)}, and drafted what may follow.`,
      }),
    ];
  }

  ofTree(pass) {
    const drafts = pass.nodes.length - 1, accepted = pass.accepted.length - 1;
    const rows = count(pass.rows, "tree row");
    const pseudo = pass.pseudo_rows.some(Boolean) ? `, ${pass.pseudo_rows.join(" + ")} pseudo rows` : "";
    return [
      element("p", { className: "big", textContent: `${count(pass.tokens.length, "token")} from one pass` }),
      element(
        "p",
        { className: "numbers" },
        element("span", { id: "accepted", textContent: drafts ? `${accepted} of ${count(drafts, "draft")} accepted` : "nothing drafted" }),
        element("span", { textContent: `${(1000 * pass.seconds).toFixed(1)} ms` }),
        element("span", { textContent: rows + pseudo }),
      ),
    ];
  }

  /** A bar for each pass, as high as it brought tokens. */
  drawTape(steps) {
    const most = Math.max(4, ...steps.map((pass) => pass.tokens.length));
    const height = 44, width = 10 * steps.length;
    const bars = steps.map((pass, step) => {
      const tall = (height * pass.tokens.length) / most;
      const title = drawn("title");
      title.textContent = `Pass ${step + 1}: ${count(pass.tokens.length, "token")}`;
      return drawn(
        "g",
        { "data-step": step, class: `hue-${step % HUES}${step === this.step ? " on" : ""}` },
        title,
        drawn("rect", { x: 10 * step, y: 0, width: 10, height, class: "reach" }),
        drawn("rect", { x: 10 * step + 1.5, y: height - tall, width: 7, height: tall, rx: 1.5, class: "bar" }),
      );
    });
    const picture = drawn("svg", { viewBox: `0 0 ${width} ${height}`, height, preserveAspectRatio: "none", "aria-hidden": "true" }, ...bars);
    // Few passes are no wider than they need, many share the room.
    picture.style.width = `min(100%, ${width}px)`;
    this.tape.replaceChildren(element("p", { className: "caption", textContent: "Tokens of each pass" }), picture);
  }
}

function tableOf(pass) {
  const rows = boxesOf(pass).map((box) =>
    element(
      "tr",
      { className: box.kind },
      element("th", { textContent: visible(box.text, 24), attributes: { scope: "row" } }),
      element("td", { textContent: box.kind === "root" ? "" : visible(pass.nodes[box.parent].text, 12) }),
      element("td", { textContent: box.place ? percent(box.given) : "" }),
      element("td", { textContent: box.place ? percent(box.probability) : "" }),
      element(
        "td",
        {},
        ...box.sources.map(mark),
        element("span", { className: box.sources.length ? "unseen" : "", textContent: box.kind === "own" ? "model" : box.sources.join(", ") }),
      ),
      element("td", { textContent: { root: "certain before", accepted: "accepted", rejected: "not taken", own: "chosen" }[box.kind] }),
    ),
  );
  const head = ["Token", "After", "Given that", "Path", "From", ""].map((name) =>
    element("th", { textContent: name, attributes: { scope: "col" } }),
  );
  return element("table", {}, element("thead", {}, element("tr", {}, ...head)), element("tbody", {}, ...rows));
}
