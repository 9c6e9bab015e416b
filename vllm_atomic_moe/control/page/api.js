// The server: the admin endpoint with the admin key, the API under /v1 with its own key. Both keys are
// in the session storage of the tab, and neither is ever sent to the other's routes.

const ADMIN = "atomic-moe-admin-key";
const SERVING = "atomic-moe-serving-key";
// More than the sum of a change's own timeouts.
const ANSWER_TIMEOUT_MS = 180_000;

/** An answer that is not a success, or none: then `status` is 0. */
export class ApiError extends Error {
  constructor(status, kind, message) {
    super(message);
    this.status = status;
    this.kind = kind;
  }

  /** The server's own words. */
  get words() {
    return this.status ? `${this.status} ${this.kind}: ${this.message}` : this.message;
  }
}

export const adminKey = keyIn(ADMIN);
export const servingKey = keyIn(SERVING);

function keyIn(name) {
  return {
    get: () => sessionStorage.getItem(name) ?? "",
    /** Keep a key; an error where no header could carry it. */
    set(key) {
      if (!/^[\x21-\x7e]+$/.test(key)) {
        throw new ApiError(0, "", "A key has printable ASCII characters only, and no spaces.");
      }
      sessionStorage.setItem(name, key);
    },
    forget: () => sessionStorage.removeItem(name),
  };
}

/** What a route of the admin endpoint answers. */
export async function admin(method, path, body) {
  const signal = AbortSignal.timeout(ANSWER_TIMEOUT_MS);
  const answer = await send(`v1/${path}`, method, adminKey.get(), body, signal);
  return parsed(await textOf(answer), answer.status);
}

/** The model names of the API server, as `GET /v1/models` lists them. */
export async function models() {
  const signal = AbortSignal.timeout(ANSWER_TIMEOUT_MS);
  const answer = await send("../v1/models", "GET", servingKey.get(), undefined, signal);
  return parsed(await textOf(answer), answer.status).data;
}

/**
 * Post to a route of the API that streams, and give every event as it arrives.
 *
 * Yields the answer itself first, for its headers, then the parsed events.
 */
export async function* stream(route, body, signal) {
  const answer = await send(`../v1/${route}`, "POST", servingKey.get(), body, signal);
  yield answer;
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let pending = "";
  for (;;) {
    const { done, value } = await reader.read().catch(unreachable);
    if (done) return;
    const lines = (pending + value).split("\n");
    pending = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ") || line.startsWith("data: [DONE]")) continue;
      const event = parsed(line.slice("data: ".length), answer.status);
      if (event.error) throw failure(event, answer.status);
      yield event;
    }
  }
}

async function send(url, method, key, body, signal) {
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  if (body !== undefined) headers["Content-Type"] = "application/json";
  const options = { method, headers, signal, cache: "no-store", credentials: "same-origin" };
  if (body !== undefined) options.body = JSON.stringify(body);
  const answer = await fetch(url, options).catch(unreachable);
  if (!answer.ok) throw failure(parsed(await textOf(answer), answer.status), answer.status);
  return answer;
}

function textOf(answer) {
  return answer.text().catch(unreachable);
}

function unreachable(error) {
  if (error.name === "AbortError") throw error; // who asked has stopped it
  throw new ApiError(0, "", "The server does not answer.");
}

function parsed(text, status) {
  try {
    return JSON.parse(text);
  } catch {
    throw new ApiError(status, "", "the answer is not from a vLLM server");
  }
}

function failure(answer, status) {
  // vLLM's shape; its check of API keys says {"error": "Unauthorized"}.
  const error = answer.error ?? {};
  if (typeof error === "string") return new ApiError(status, "", error);
  return new ApiError(error.code ?? status, error.type ?? "", error.message ?? "no reason given");
}
