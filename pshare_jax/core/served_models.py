"""Which models are served, who uses them, and which decode workers generate for them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping

from pshare_jax.core.models import ModelSpec


class ServedModels:
    """Models by name; one that is taken away stays until the last request to it has ended.

    Args:
        specs: the models that are served at first.
    """

    def __init__(self, specs: Mapping[str, ModelSpec]):
        self._specs = dict(specs)
        self._users: Counter[str] = Counter()
        self._leaving: dict[str, ModelSpec] = {}
        self._hosted: dict[str, frozenset[str]] = {}

    def find(self, name: str) -> ModelSpec | None:
        """What is served under `name` at present."""
        return self._specs.get(name)

    def set(self, name: str, spec: ModelSpec) -> None:
        """Serves a model under `name`, where nothing must be served."""
        self._specs[name] = spec

    def remove(self, name: str) -> ModelSpec | None:
        """Serves nothing under `name` any more; the model, if nobody is left who uses it."""
        spec = self._specs.pop(name, None)
        if spec is None:
            return None
        self._leaving[spec.name] = spec
        return self._retired(spec)

    def use(self, spec: ModelSpec) -> None:
        """A request to that model has come."""
        self._users[spec.name] += 1

    def leave(self, spec: ModelSpec) -> ModelSpec | None:
        """A request to that model has ended; the model, if it was removed and this was the last."""
        self._users[spec.name] -= 1
        return self._retired(spec)

    def hosted(self, worker: str, models: Collection[str]) -> None:
        """A worker generates for these models, beside those that name it themselves."""
        self._hosted[worker] = frozenset(models)

    def hosts(self, spec: ModelSpec) -> list[str]:
        """Decode workers that can generate for a model, if they are alive."""
        hosting = [name for name, models in self._hosted.items() if spec.name in models]
        return [*spec.decode_workers, *hosting]

    def all_hosts(self) -> dict[str, list[str]]:
        """The decode workers of each model that is served, or used by a request."""
        return {
            spec.name: self.hosts(spec) for spec in (*self._specs.values(), *self._leaving.values())
        }

    def hosts_of_names(self, names: Collection[str]) -> Counter[str]:
        """Decode workers by how many of the models of these names they host."""
        specs = [self._specs[name] for name in names if name in self._specs]
        return Counter(host for spec in specs for host in self.hosts(spec))

    def _retired(self, spec: ModelSpec) -> ModelSpec | None:
        if self._users[spec.name] or spec.name not in self._leaving:
            return None
        del self._leaving[spec.name], self._users[spec.name]
        return spec
