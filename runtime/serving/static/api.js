// The server's API, asked from this page's own place: it works wherever the server is mounted.

/** An answer that is an error, in one line for people. */
export class ApiProblem extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

const place = (path) => new URL(path, document.baseURI);

function headers(key, more = {}) {
  return key ? { ...more, authorization: `Bearer ${key}` } : more;
}

async function problemOf(response) {
  const text = await response.text();
  try {
    const { error } = JSON.parse(text);
    return new ApiProblem(response.status, error.message);
  } catch {
    return new ApiProblem(response.status, text.trim().slice(0, 300) || response.statusText);
  }
}

/** Return the names that the model is served under. */
export async function models(key) {
  const response = await fetch(place("v1/models"), { headers: headers(key) });
  if (!response.ok) throw await problemOf(response);
  return (await response.json()).data.map((model) => model.id);
}

/** Ask for a streamed chat; yield the events as they come. Leaving it, or `signal`, ends the request. */
export async function* chat(body, key, signal) {
  const response = await fetch(place("v1/chat/completions"), {
    method: "POST",
    headers: headers(key, { "content-type": "application/json" }),
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_passes: true } }),
    signal,
  });
  if (!response.ok) throw await problemOf(response);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) throw new ApiProblem(0, "the connection ended before the answer did");
      const events = (rest + value).split("\n\n");
      rest = events.pop();
      for (const event of events) {
        const data = event.slice(event.indexOf("data: ") + 6);
        if (data === "[DONE]") return;
        const told = JSON.parse(data);
        if (told.error) throw new ApiProblem(0, told.error.message);
        yield told;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
