"""What a second stage says of the regions that it was asked about, as `Answers`."""

import torch
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder

from data_sharding.batch import Batch, Outputs
from kd.blocks.answers import Answers
from kd.blocks.region_targets import region_targets


def region_answers(outputs: Outputs, batch: Batch, share: Tensor, coder: BoxCoder) -> Answers:
    """One answer for each region of `outputs.proposals`, which may be on the objects or beside them."""
    assert outputs.roi_logits is not None
    assert outputs.roi_deltas is not None
    logits, targets = outputs.roi_logits.float(), region_targets(outputs.proposals, batch)
    counts = torch.tensor([len(p) for p in outputs.proposals], device=logits.device)
    return Answers(
        image=torch.repeat_interleave(counts, output_size=len(logits)),
        logits=logits,
        codes=outputs.roi_deltas.float().unflatten(1, (-1, 4)),
        places=targets.boxes,
        truth=targets.which,
        label=targets.labels - 1,
        allowed=targets.counted,
        share=share,
        regions=True,
        decode=lambda codes: coder.decode_single(codes, targets.boxes),
    )
