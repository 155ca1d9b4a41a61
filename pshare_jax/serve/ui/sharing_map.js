// The sharing map: contexts as bars of pages, by who computed them and who reads them.

const COLOURS = 8;

/** The colour of a model: by its place among the served ones. */
export function colour(models, name) {
  const index = models.indexOf(name);
  return index < 0 ? "var(--unknown)" : `var(--model-${index % COLOURS})`;
}

/** A page as the stream has it: an array of its fields. */
export function page([tokens, computedBy, readers, pools, arriving, tiers]) {
  return { tokens, computedBy, readers, pools, arriving, tiers };
}

const TIERS = { shared: "in shared memory", disk: "on disk" };

/** The background of a page: a stripe for each run of tokens, as wide as it is long. */
export function background(models, { computedBy }) {
  const all = computedBy.reduce((sum, [, tokens]) => sum + tokens, 0);
  if (!all) return "";
  let at = 0;
  const stops = computedBy.flatMap(([name, tokens]) => {
    const from = (100 * at) / all;
    at += tokens;
    return [`${colour(models, name)} ${from}% ${(100 * at) / all}%`];
  });
  return `linear-gradient(to right, ${stops.join(", ")})`;
}

/** A page in words. */
export function describe(page) {
  const computed = page.computedBy.map(([name, tokens]) => `${tokens} computed for ${name}`);
  const parts = [
    `${page.tokens} tokens`,
    computed.join(", ") || "computed for a call that is no longer known",
    page.readers.length ? `read now by ${page.readers.join(", ")}` : "read by nobody now",
    `in ${page.pools.join(" and ")}`,
  ];
  if (page.arriving) parts.push("on its way to a pool");
  if (page.tiers.length) {
    parts.push(`kept ${page.tiers.map((tier) => TIERS[tier] ?? `in ${tier}`).join(" and ")}`);
  }
  return parts.join("; ");
}

/** What the map shows, in figures. */
export function summary(map) {
  const pages = map.contexts.flatMap((context) => context.pages.map(page));
  if (!pages.length) return "No pool holds a context yet: ask a model, below or by the API.";
  const shared = pages.filter((page) => page.readers.length > 1).length;
  const several = pages.filter((p) => new Set(p.computedBy.map(([name]) => name)).size > 1).length;
  const moving = pages.filter((page) => page.arriving).length;
  const kept = pages.filter((page) => page.tiers.length).length;
  const store = kept ? `; ${kept} in the KV store` : "";
  const hidden = map.hidden ? `; ${map.hidden} older pages are not shown` : "";
  return (
    `${pages.length} pages of ${map.page_size} tokens; ${shared} read by several models now; ` +
    `${several} computed for several; ${moving} on their way${store}${hidden}`
  );
}

/** Draws the map into a list; `details` gets the words of the page that has the focus. */
export class SharingMap {
  #list;
  #details;
  #drawn = new Map();

  constructor(list, details) {
    this.#list = list;
    this.#details = details;
  }

  draw(models, map) {
    const size = map.page_size;
    const drawn = new Map();
    for (const context of map.contexts) {
      const text = JSON.stringify([models, context]);
      const before = this.#drawn.get(context.id);
      // Bars that are as they were keep their elements, and so the focus.
      drawn.set(
        context.id,
        before?.text === text ? before : { text, bar: this.#bar(models, context, size) },
      );
    }
    this.#drawn = drawn;
    this.#list.replaceChildren(...[...drawn.values()].map(({ bar }) => bar));
  }

  #bar(models, context, size) {
    const bar = document.createElement("li");
    bar.className = "context";
    bar.style.marginLeft = `calc(${context.start} * (1.1rem + 2px))`;
    bar.append(...context.pages.map((fields) => this.#page(models, page(fields), size)));
    return bar;
  }

  #page(models, page, size) {
    const box = document.createElement("button");
    box.type = "button";
    box.className = page.arriving ? "page arriving" : "page";
    const words = describe(page);
    box.title = words;
    box.setAttribute("aria-label", words);
    box.addEventListener("focus", () => (this.#details.textContent = words));
    if (page.tiers.length) box.classList.add(page.tiers.includes("shared") ? "kept" : "on-disk");
    const fill = document.createElement("b");
    fill.style.background = background(models, page);
    fill.style.width = `${(100 * page.tokens) / size}%`;
    const readers = document.createElement("span");
    readers.className = "readers";
    for (const name of page.readers) {
      const mark = document.createElement("i");
      mark.style.background = colour(models, name);
      readers.append(mark);
    }
    box.append(fill, readers);
    return box;
  }
}
