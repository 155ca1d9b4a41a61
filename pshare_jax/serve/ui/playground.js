// The playground: one context and question for several models at once, streamed side by side.

import { events, request } from "./api.js";

/** The body of a chat request. */
export function chatBody(model, { context, question, tools, maxTokens }) {
  const messages = [context, question]
    .filter((text) => text.trim())
    .map((content) => ({ role: "user", content }));
  const body = {
    model,
    messages,
    max_tokens: maxTokens,
    stream: true,
    stream_options: { include_usage: true },
  };
  return tools.trim() ? { ...body, tools: JSON.parse(tools) } : body;
}

/** An answer as its chunks make it: text, thoughts, calls, usage. */
export class Answer {
  text = "";
  thoughts = "";
  calls = [];
  finish = null;
  usage = null;
  firstToken = null;

  /** Takes a chunk in; `seconds` are since the request was sent. */
  add(chunk, seconds) {
    if (chunk.error) throw new Error(chunk.error.message);
    this.usage = chunk.usage ?? this.usage;
    const choice = chunk.choices?.[0];
    if (!choice) return;
    this.finish = choice.finish_reason ?? this.finish;
    const { content, reasoning_content: thoughts, tool_calls: calls } = choice.delta;
    if (content || thoughts || calls?.length) this.firstToken ??= seconds;
    this.text += content ?? "";
    this.thoughts += thoughts ?? "";
    for (const { index, function: { name = "", arguments: more = "" } = {} } of calls ?? []) {
      this.calls[index] ??= { name: "", arguments: "" };
      this.calls[index].name += name ?? "";
      this.calls[index].arguments += more ?? "";
    }
  }

  /** What it cost, in words. */
  cost() {
    const parts = [];
    if (this.firstToken !== null) parts.push(`first token after ${this.firstToken.toFixed(2)} s`);
    if (this.usage) {
      const { prompt_tokens: prompt, completion_tokens: written } = this.usage;
      const details = this.usage.prompt_tokens_details ?? {};
      const cached = details.cached_tokens ?? 0;
      parts.push(
        `prompt of ${prompt}: ${prompt - cached} computed, ${cached} cached, ` +
          `${details.shared_tokens ?? 0} of them from other models`,
        `${written} written`,
      );
    }
    if (this.finish) parts.push(this.finish);
    return parts.join(" · ");
  }
}

/** The part of the page that shows one answer. Whatever a model writes is text. */
class AnswerView {
  constructor(model) {
    this.element = document.createElement("article");
    this.element.className = "answer";
    this.element.setAttribute("aria-busy", "true");
    this.parts = {};
    for (const [name, tag] of Object.entries({ model: "h3", thoughts: "pre", text: "pre" })) {
      this.parts[name] = document.createElement(tag);
      this.parts[name].className = name;
    }
    this.parts.model.textContent = model;
    this.calls = document.createElement("div");
    this.cost = document.createElement("p");
    this.cost.className = "cost";
    this.element.append(...Object.values(this.parts), this.calls, this.cost);
  }

  show(answer) {
    this.parts.thoughts.textContent = answer.thoughts;
    this.parts.text.textContent = answer.text;
    this.calls.replaceChildren(
      ...answer.calls.map(({ name, arguments: given }) => {
        const call = document.createElement("pre");
        call.className = "call";
        call.textContent = `${name}(${given})`;
        return call;
      }),
    );
    this.cost.textContent = answer.cost();
  }

  fail(error) {
    const stopped = error.name === "AbortError";
    this.cost.classList.toggle("bad", !stopped);
    this.cost.textContent = stopped ? `stopped · ${this.cost.textContent}` : error.message;
  }
}

/** Asks one model, and shows its answer as it comes. */
async function ask(model, form, signal, view) {
  const answer = new Answer();
  const started = performance.now();
  try {
    const response = await request("/v1/chat/completions", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(chatBody(model, form)),
      signal,
    });
    for await (const data of events(response)) {
      if (data === "[DONE]") break;
      answer.add(JSON.parse(data), (performance.now() - started) / 1000);
      view.show(answer);
    }
  } catch (error) {
    view.fail(error);
  }
  view.element.setAttribute("aria-busy", "false");
}

export class Playground {
  #at = (id) => document.getElementById(id);
  #models = [];
  #running = null;

  constructor() {
    const form = this.#at("playground");
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.#askAll();
    });
    form.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
    });
    this.#at("stop").addEventListener("click", () => this.#running?.abort());
  }

  /** Offers these models; choices that were made stay. */
  offer(models) {
    if (JSON.stringify(models) === JSON.stringify(this.#models)) return;
    this.#models = models;
    this.#at("choices").replaceChildren(
      ...models.map((name) => {
        const label = document.createElement("label");
        const box = document.createElement("input");
        box.type = "checkbox";
        box.value = name;
        box.checked = true;
        label.append(box, ` ${name}`);
        return label;
      }),
    );
  }

  async #askAll() {
    if (this.#running) return;
    const error = this.#at("playground-error");
    error.textContent = "";
    const boxes = this.#at("choices").querySelectorAll("input:checked");
    const form = {
      context: this.#at("context").value,
      question: this.#at("question").value,
      tools: this.#at("tools").value,
      maxTokens: Number(this.#at("max-tokens").value),
    };
    if (!boxes.length || !(form.context + form.question).trim()) {
      error.textContent = "Choose a model, and write a context or a question.";
      return;
    }
    try {
      chatBody("", form);
    } catch (problem) {
      error.textContent = `Tools: ${problem.message}`;
      return;
    }
    this.#running = new AbortController();
    this.#busy(true);
    const views = [...boxes].map(({ value }) => new AnswerView(value));
    this.#at("answers").replaceChildren(...views.map(({ element }) => element));
    await Promise.all(
      views.map((view) =>
        ask(view.parts.model.textContent, form, this.#running.signal, view),
      ),
    );
    this.#running = null;
    this.#busy(false);
  }

  #busy(is) {
    this.#at("ask").disabled = is;
    this.#at("stop").disabled = !is;
  }
}
