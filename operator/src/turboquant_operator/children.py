"""The children that an object has, as last seen. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from turboquant_operator.api.object import Identity
from turboquant_operator.builders.metadata import COMPONENT, ENGINE, Manifest


@dataclass(frozen=True)
class Children:
    """The children that an object has, by kind and name, as last seen."""

    by_name: Mapping[tuple[str, str], Manifest] = field(default_factory=dict)

    def get(self, kind: str, name: str) -> Manifest | None:
        """A child, None where there is none."""
        return self.by_name.get((kind, name))

    def owned_by(self, owner: Identity) -> "Children":
        """Those that are the object's own: others of its labels and names are not to be touched."""

        def is_own(kind: str, manifest: Manifest) -> bool:
            return kind == "Event" or _is_engine_pod(kind, manifest) or owner.owns(manifest)

        own = {key: manifest for key, manifest in self.by_name.items() if is_own(key[0], manifest)}
        return Children(own)

    def engine_pods(self) -> tuple[Manifest, ...]:
        """The pods of the Deployment, of this and of earlier plans."""
        return tuple(
            manifest for (kind, _), manifest in self.by_name.items() if _is_engine_pod(kind, manifest)
        )

    def mount_failures(self) -> dict[str, str]:
        """The last complaint about a volume, by the pod's uid."""
        events = [manifest for (kind, _), manifest in self.by_name.items() if kind == "Event"]
        events.sort(key=lambda event: event.get("lastTimestamp") or event["metadata"]["creationTimestamp"])
        return {event["involvedObject"].get("uid", ""): event.get("message", "") for event in events}


def _is_engine_pod(kind: str, manifest: Manifest) -> bool:
    """By its label: a ReplicaSet owns it."""
    return kind == "Pod" and manifest["metadata"].get("labels", {}).get(COMPONENT) == ENGINE
