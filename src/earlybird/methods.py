"""The methods there are: one plain table, readable without loading torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class MethodInfo:
    """One published method.

    Attributes:
        name: As on the command line.
        path: ``module:class`` of its hyper-parameters.
        citation: Authors, title, venue.
        link: Where the paper is.
        saves: What it saves, and in which column of the bill.
        limits: When it does not pay.
    """

    name: str
    path: str
    citation: str
    link: str
    saves: str
    limits: str


PRESET_METHODS: dict[str, tuple[str, ...]] = {"fast": ("early_bird", "progressive_resizing")}
"""Presets that call for methods of their own, where the recipe names none."""

METHODS: dict[str, MethodInfo] = {
    method.name: method
    for method in (
        MethodInfo(
            name="early_bird",
            path="earlybird.tickets.early_bird:EarlyBird",
            citation=(
                "You, Li, Xu, Fu, Wang, Chen, Baraniuk, Wang, Lin: Drawing Early-Bird Tickets: Toward More Efficient "
                "Training of Deep Networks, ICLR 2020"
            ),
            link="https://arxiv.org/abs/1909.11957",
            saves="measured seconds and bytes, counted MACs and modelled joules, from the draw on and in inference",
            limits="training that ends soon after the draw, and layers already so narrow that the device idles",
        ),
        MethodInfo(
            name="progressive_resizing",
            path="earlybird.skipping.pixels:ProgressiveResizing",
            citation="Howard, Training ImageNet in 3 hours for 25 minutes, fast.ai 2018; settings of MosaicML Composer",
            link="https://www.fast.ai/posts/2018-04-30-dawnbench-fastai.html",
            saves="measured seconds, counted MACs and modelled joules of the steps on small images",
            limits="images whose details decide, and networks that have pooled them down to few pixels already",
        ),
        MethodInfo(
            name="batch_dropping",
            path="earlybird.skipping.batches:BatchDropping",
            citation="Wang et al., E2-Train: Training State-of-the-art CNNs with Over 80% Energy Savings, NeurIPS 2019",
            link="https://arxiv.org/abs/1910.13349",
            saves="steps, and with them measured seconds, counted MACs and modelled joules in proportion",
            limits="runs for which fewer epochs are as accurate: compare with as many steps, not with the whole run",
        ),
    )
}
