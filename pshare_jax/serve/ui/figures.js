// Figures of the engine: totals, models and workers, from two states of its counters.

/** Sum of a counter over all models. */
function total(state, name) {
  return Object.values(state.models).reduce((sum, model) => sum + model[name], 0);
}

/** Growth a second of `of` between two states; 0 without an earlier one. */
export function rate(before, state, of) {
  const seconds = before ? state.time - before.time : 0;
  return seconds > 0 ? (of(state) - of(before)) / seconds : 0;
}

export function number(value) {
  return Math.round(value).toLocaleString("en");
}

export function bytes(value) {
  const unit = ["B", "KB", "MB", "GB", "TB"];
  let i = 0;
  for (; value >= 1000 && i < unit.length - 1; i++) value /= 1000;
  return `${value.toFixed(i && value < 100 ? 1 : 0)} ${unit[i]}`;
}

export function percent(part, whole) {
  return whole > 0 ? `${Math.round((100 * part) / whole)} %` : "–";
}

/** What the boxes show: [name, text] pairs. */
export function totals(before, state) {
  const computed = total(state, "computed");
  const others = total(state, "other_model");
  const cached = others + total(state, "same_model");
  return [
    ["tokens/s", number(rate(before, state, (s) => total(s, "generated")))],
    ["running", number(total(state, "running"))],
    ["waiting", number(total(state, "waiting"))],
    ["prompt tokens computed", number(computed)],
    ["prompt tokens saved", number(cached)],
    ["saved, of all prompt tokens", percent(cached, cached + computed)],
    ["saved by other models", number(others)],
    ["KV handed over", bytes(total(state, "handoff_bytes"))],
    ["KV handed over now", `${bytes(rate(before, state, (s) => total(s, "handoff_bytes")))}/s`],
  ];
}

/** Rows of the models' table. */
export function modelRows(before, state) {
  return Object.entries(state.models).map(([name, model]) => [
    name,
    `${model.sharing}, ${model.kind}`,
    number(model.running),
    number(model.waiting),
    number(rate(before, state, (s) => s.models[name]?.generated ?? 0)),
    number(model.computed),
    number(model.same_model + model.other_model),
    number(model.other_model),
    bytes(model.handoff_bytes),
  ]);
}

/** Rows of the workers' table. */
export function workerRows(before, state) {
  return Object.entries(state.workers).map(([name, worker]) => [
    worker.failed ? `${name} (failed: ${worker.failed})` : name,
    percent(Math.min(rate(before, state, (s) => s.workers[name]?.busy_seconds ?? 0), 1), 1),
    `${number(worker.used)} of ${number(worker.total)}`,
    number(worker.shared),
    number(worker.cached),
    number(worker.free),
    number(worker.failed_transfers),
  ]);
}

/** Rows of the KV store's table. Pages are those of all servers that share it. */
export function tierRows(state) {
  return Object.entries(state.tiers).map(([name, tier]) => {
    const { free = 0, writing = 0, ready = 0 } = tier.slots;
    const { bytes_written: written, raw_bytes_written: raw } = tier;
    return [
      name === "shared" ? "shared memory" : name,
      `${number(writing + ready)} of ${number(free + writing + ready)}`,
      number(tier.hits),
      number(tier.missed),
      number(tier.stored),
      bytes(tier.bytes_read),
      bytes(written),
      written ? `${(raw / written).toFixed(2)} : 1` : "–",
    ];
  });
}

function ago(seconds) {
  if (seconds < 60) return `${Math.max(Math.floor(seconds), 0)} s ago`;
  return seconds < 3600 ? `${Math.floor(seconds / 60)} min ago` : `${Math.floor(seconds / 3600)} h ago`;
}

/** Rows of the sessions' table; `now` is on the clock of `state.time`. */
export function sessionRows(sessions, now) {
  return sessions.map((session) => [
    session.id,
    session.key || "–",
    Object.entries(session.calls)
      .map(([model, count]) => (count > 1 ? `${model} × ${count}` : model))
      .join(", "),
    session.running ? `${session.running} running` : ago(now - session.last),
    number(session.prompt),
    `${number(session.cached)} (${percent(session.cached, session.prompt)})`,
    number(session.shared),
    number(session.generated),
  ]);
}
