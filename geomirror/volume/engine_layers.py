"""Images of a fresh primary that are not where they are said to be: read through a layer.

```
 promoted at e, images at d < e   reads: tables of (d, e], image   passes (d, …] end at e
 promoted at E0, held by undo     reads: undo, image               passes, going back: in turn
```
Invariants: `images` read as the state that the dirty indexes lie on; passes and views take what is
below. A layer is not needed for anything to be durable: an opened engine makes it again.
Deliberately not here: how a layer is read (`layered_image`), going back (`engine_return`).
"""

from __future__ import annotations

from geomirror.volume.apply import ApplyJob
from geomirror.volume.engine_base import EngineBase
from geomirror.volume.engine_recovery import read_epoch
from geomirror.volume.epoch_table import Table
from geomirror.volume.image import Image
from geomirror.volume.layered_image import Layer, LayeredImage
from geomirror.volume.merge import merge_tables
from geomirror.volume.unapplied import UnappliedLayer


class LayeredImages(EngineBase):
    """The part of `Engine` that serves images before they are right."""

    _layer: Layer | None = None

    @property
    def has_layer(self) -> bool:
        """Images are read through one: what a reader needs may lie in the journal."""
        return self._layer is not None

    @property
    def physical_images(self) -> dict[int, Image]:
        """The images as they are in their files."""
        return {index: image.physical for index, image in self.images.items()}

    @property
    def unapplied_promotion(self) -> int | None:
        """The epoch of this primary's promotion, while no image holds it."""
        superblock = self.superblock
        if superblock.role != "primary" or not superblock.chain:
            return None
        epoch = superblock.chain[-1].parent_epoch
        return epoch if self.applied_epoch < epoch else None

    def lay_unapplied(self) -> None:
        """Let readers see the epochs from before the promotion that no image holds."""
        through = self.unapplied_promotion
        if through is None:
            self._set_layer(None)
            return
        journal, limits = self.journal, self.limits
        infos = [i for i in self._directory.after(self.applied_epoch) if i.number <= through]
        lsns = [info.record_lsn for info in infos]

        def load() -> Table:
            return merge_tables([read_epoch(journal, limits, lsn)[0].table for lsn in lsns])

        self._set_layer(UnappliedLayer(load, journal.read))

    def pass_end(self, through_epoch: int) -> int:
        """See `EngineBase`; no pass goes on past a promotion, so that it can be gone back to."""
        promoted = self.unapplied_promotion
        return super().pass_end(through_epoch if promoted is None else min(through_epoch, promoted))

    def complete_apply(self, job: ApplyJob) -> None:
        """See `EngineBase`."""
        super().complete_apply(job)
        if isinstance(self._layer, UnappliedLayer):
            self.lay_unapplied()

    def _set_layer(self, layer: Layer | None) -> None:
        # One by one: whoever reads meanwhile sees the same through either.
        for index, image in self.physical_images.items():
            self.images[index] = image if layer is None else LayeredImage(image, layer)
        self._layer = layer
