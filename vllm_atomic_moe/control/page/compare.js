// Two profiles answer the same prompt side by side.

import { models, servingKey, stream } from "./api.js";
import { byId, element, say, setOptions, setText } from "./dom.js";

const HEADER = "x-atomic-moe-profile";
const SHOW_MS = 250; // between two looks at the clock

export class Compare {
  #sides = Array.from(document.querySelectorAll(".answer"), (article) => new Side(article));
  #stop = null;
  #tick = null;

  constructor() {
    byId("compare-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#ask();
    });
    byId("stop").addEventListener("click", () => this.#stop?.abort());
    byId("serving-form").addEventListener("submit", (event) => {
      event.preventDefault();
      try {
        servingKey.set(byId("serving-key").value.trim());
        this.#ask();
      } catch (error) {
        setText(byId("serving-error"), error.words);
      }
    });
  }

  /** The profiles that can be asked: those that are loaded. */
  offer(names, active) {
    const other = names.find((name) => name !== active) ?? active;
    setOptions(this.#sides[0].select, names, active);
    setOptions(this.#sides[1].select, names, other);
  }

  async #ask() {
    if (this.#stop) return;
    this.#stop = new AbortController();
    this.#show(true);
    try {
      const alias = await this.#alias();
      if (alias === null) return;
      const ask = (side) => side.ask(alias, request(), this.#stop.signal);
      if (byId("in-turn").checked) for (const side of this.#sides) await ask(side);
      else await Promise.all(this.#sides.map(ask));
      if (this.#sides.every((side) => side.complete)) this.#tellDifference();
    } catch (error) {
      if (error.name !== "AbortError") say(byId("compare-trouble"), error.words ?? String(error));
    } finally {
      this.#stop = null;
      this.#show(false);
    }
  }

  /** The model's name to which the profiles are added; null where a key must be given first. */
  async #alias() {
    const asked = servingKey.get();
    try {
      const listed = (await models()).find((model) => !model.parent);
      byId("serving-form").hidden = true;
      byId("serving-key").value = "";
      return listed.id;
    } catch (error) {
      if (error.status !== 401) throw error;
      servingKey.forget();
      byId("serving-form").hidden = false;
      setText(byId("serving-error"), asked ? "The server does not take this key." : "");
      byId("serving-key").focus();
      return null;
    }
  }

  #show(asking) {
    byId("ask").disabled = asking;
    byId("stop").hidden = !asking;
    clearInterval(this.#tick);
    if (!asking) return;
    say(byId("compare-trouble"), "");
    setText(byId("difference"), "");
    for (const side of this.#sides) side.clear();
    this.#tick = setInterval(() => this.#sides.forEach((side) => side.tell()), SHOW_MS);
  }

  #tellDifference() {
    const [one, two] = this.#sides.map((side) => [...side.text]);
    let same = 0;
    while (same < one.length && one[same] === two[same]) same += 1;
    if (same === one.length && same === two.length) {
      setText(byId("difference"), "Both answers are the same.");
      return;
    }
    const where = same
      ? `Both answers begin with the same ${same} characters, then they differ.`
      : "The answers differ from the first character on.";
    setText(byId("difference"), where);
    for (const side of this.#sides) side.mark(same);
  }
}

function request() {
  const prompt = byId("prompt").value;
  const route = byId("as").value;
  const question =
    route === "completions" ? { prompt } : { messages: [{ role: "user", content: prompt }] };
  const body = {
    ...question,
    max_tokens: Number(byId("max-tokens").value),
    temperature: Number(byId("temperature").value),
    stream: true,
    stream_options: { include_usage: true, continuous_usage_stats: true },
  };
  return { route, body };
}

/** One profile's answer and its speed. */
class Side {
  text = "";
  #article;
  #begun = 0; // times of the request and of its first and latest tokens
  #first = 0;
  #latest = 0;
  #atFirst = 0; // tokens of the first event
  #tokens = 0;
  #profile = "";
  #trouble = "";
  complete = false; // the answer is complete

  constructor(article) {
    this.#article = article;
    this.select = article.querySelector("select");
  }

  clear() {
    this.text = "";
    this.#begun = this.#first = this.#latest = this.#atFirst = this.#tokens = 0;
    this.#profile = this.#trouble = "";
    this.complete = false;
    this.#article.querySelector("pre").textContent = "";
    this.#article.classList.remove("done");
    this.tell();
  }

  /** Stream an answer. What goes wrong is said beside it; the other side goes on. */
  async ask(alias, { route, body }, signal) {
    if (signal.aborted) return;
    const output = this.#article.querySelector("pre");
    this.#begun = performance.now();
    try {
      const events = stream(route, { ...body, model: `${alias}:${this.select.value}` }, signal);
      this.#profile = (await events.next()).value.headers.get(HEADER) ?? "";
      for await (const event of events) {
        const choice = event.choices[0];
        const piece = choice?.text ?? choice?.delta?.content ?? "";
        this.#count(event.usage?.completion_tokens ?? 0);
        this.text += piece;
        output.append(piece);
        output.scrollTop = output.scrollHeight;
      }
      this.complete = true;
      this.#article.classList.add("done");
    } catch (error) {
      this.#trouble = error.name === "AbortError" ? "stopped" : (error.words ?? String(error));
    }
    this.tell();
  }

  #count(tokens) {
    if (tokens <= this.#tokens) return;
    this.#latest = performance.now();
    if (!this.#tokens) [this.#first, this.#atFirst] = [this.#latest, tokens];
    this.#tokens = tokens;
  }

  /** Say how fast it is: tokens after the first event, over the time since then. */
  tell() {
    const words = [];
    if (this.#profile) words.push(`answered by ${this.#profile}`);
    if (this.#tokens) {
      words.push(`${this.#tokens} tokens`);
      const seconds = (this.#latest - this.#first) / 1000;
      const after = this.#tokens - this.#atFirst;
      if (after) words.push(`${(after / seconds).toFixed(1)} tokens/s`);
      words.push(`first after ${Math.round(this.#first - this.#begun)} ms`);
    } else if (this.#begun && !this.complete && !this.#trouble) {
      words.push("waiting …");
    }
    if (this.#trouble) words.push(this.#trouble);
    setText(this.#article.querySelector(".speed"), words.join(" · "));
  }

  /** Mark so many characters as those that both answers begin with. */
  mark(same) {
    const characters = [...this.text];
    const output = this.#article.querySelector("pre");
    const both = element("mark", { text: characters.slice(0, same).join("") });
    output.replaceChildren(both, characters.slice(same).join(""));
    output.scrollTop = 0;
  }
}
