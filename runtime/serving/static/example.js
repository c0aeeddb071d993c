// A pass to explain the picture by, before there is an answer: that of docs/architecture.md.

const drafts = "transfer layers";

export const EXAMPLE = {
  prompt: false,
  rows: 5,
  pseudo_rows: [2, 1],
  seconds: 0,
  nodes: [
    { text: " the", parent: -1, probability: 1, sources: [] },
    { text: " cat", parent: 0, probability: 0.6, sources: [drafts, "text"] },
    { text: " dog", parent: 0, probability: 0.3, sources: [drafts] },
    { text: " sat", parent: 1, probability: 0.2, sources: ["text"] },
    { text: " is", parent: 1, probability: 0.3, sources: [drafts] },
  ],
  accepted: [0, 1, 4],
  tokens: [{ text: " cat" }, { text: " is" }, { text: " asleep" }],
};
