"""The artifact store: publication by manifest, attempts, cells, cleaning; a folder or an object store.

Other packages import this one; `provenance` and `removal` are imported directly.
"""

from resources.store.store import Artifact, ArtifactError, ArtifactStore, Draft

__all__ = ["Artifact", "ArtifactError", "ArtifactStore", "Draft"]
