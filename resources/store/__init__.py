"""The artifact store: publication by manifest, attempts, cells, cleaning; a folder or an object store.

From outside, import this package; `provenance` and `removal` stand for themselves.
"""

from resources.store.store import Artifact, ArtifactError, ArtifactStore, Draft

__all__ = ["Artifact", "ArtifactError", "ArtifactStore", "Draft"]
