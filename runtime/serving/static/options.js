// What is asked besides the messages. What is left empty is left out, and then the server's own.

const find = (id) => document.getElementById(id);
const NUMBERS = ["temperature", "top_p", "top_k", "min_p", "seed", "max_tokens"];
const KEY = "key";

/** Return the fields of a request that the options ask for. A drawn answer has a seed always: it can be had again. */
export function asked() {
  const found = { model: find("model-choice").value };
  for (const name of NUMBERS) {
    const field = find(name);
    // What is no number at all is refused here, as JSON has no way to send it; ranges are the server's to judge.
    if (field.validity.badInput) throw new Error(`${field.labels[0].textContent} is no number`);
    if (field.value !== "") found[name] = Number(field.value);
  }
  if (found.temperature !== 0 && found.seed === undefined) found.seed = Math.floor(Math.random() * 2 ** 31);
  found.speculate = find("speculate").checked;
  return found;
}

/** Return the system message, if there is one. */
export function system() {
  const content = find("system").value;
  return content.trim() ? [{ role: "system", content }] : [];
}

/** The API key, kept for this tab alone. */
export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => (value ? sessionStorage.setItem(KEY, value) : sessionStorage.removeItem(KEY)),
};

/** Show the names of the model, to choose from where there are several. */
export function showModels(names) {
  const choice = find("model-choice");
  choice.replaceChildren(...names.map((name) => new Option(name, name)));
  find("models").hidden = names.length < 2;
  find("model").textContent = names[0];
}
