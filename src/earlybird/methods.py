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
        exported: What an exported network lacks of what was evaluated, in a whole sentence; or empty.
    """

    name: str
    path: str
    citation: str
    link: str
    saves: str
    limits: str
    exported: str = ""


PRESET_METHODS: dict[str, tuple[str, ...]] = {"fast": ("early_bird", "progressive_resizing")}
"""Presets that call for methods of their own, where the recipe names none."""

SHORT_NAMES: dict[str, tuple[str, dict[str, str]]] = {
    "imp": ("iterative", {}),
    "lr_rewinding": ("iterative", {"rewind": "learning_rate"}),
    "fine_tuning": ("iterative", {"rewind": "fine_tuning"}),
    "snip": ("at_init", {"init_score": "snip", "init_units": "weight"}),
    "grasp": ("at_init", {"init_score": "grasp", "init_units": "weight"}),
    "synflow": ("at_init", {"init_score": "synflow", "init_units": "weight"}),
    "random": ("at_init", {"init_score": "random", "init_units": "weight"}),
    "set": ("dynamic_sparse", {"regrow": "set"}),
    "rigl": ("dynamic_sparse", {"regrow": "rigl"}),
}
"""What people call a method, and what that is: its name here, and the settings that make it so, as published."""

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
            name="early_bert",
            path="earlybird.tickets.early_bert:EarlyBert",
            citation="Chen et al., EarlyBERT: Efficient BERT Training via Early-bird Lottery Tickets, ACL 2021",
            link="https://arxiv.org/abs/2101.00063",
            saves="measured seconds and bytes, counted MACs and modelled joules of transformers, from the draw on",
            limits="small transformers, where embeddings and classifier are most of the work, and short trainings",
        ),
        MethodInfo(
            name="iterative",
            path="earlybird.tickets.iterative:Iterative",
            citation="Frankle, Carbin: The Lottery Ticket Hypothesis: Finding Sparse, Trainable Neural Networks, ICLR "
            "2019; Renda et al., Comparing Rewinding and Fine-tuning in Neural Network Pruning, ICLR 2020",
            link="https://arxiv.org/abs/1803.03635",
            saves="stored weights; counted bit-MACs and modelled joules of inference on hardware that skips zeros",
            limits="training, which it makes many times dearer: it finds the tickets that others are measured by",
        ),
        MethodInfo(
            name="at_init",
            path="earlybird.tickets.at_init:AtInit",
            citation="Lee et al., SNIP, ICLR 2019; Wang et al., GraSP (arXiv 2002.07376), ICLR 2020; Tanaka et al., "
            "SynFlow (arXiv 2006.05467), NeurIPS 2020",
            link="https://arxiv.org/abs/1810.02340",
            saves="measured seconds and bytes, counted MACs and modelled joules from the first step on, over channels",
            limits="accuracy, where untrained weights say little; and time, over single weights, which are only masked",
        ),
        MethodInfo(
            name="fixed_ticket",
            path="earlybird.tickets.fixed:FixedTicket",
            citation="Frankle, Carbin: The Lottery Ticket Hypothesis, ICLR 2019; controls: Su et al., Sanity-Checking "
            "Pruning Methods: Random Tickets can Win the Jackpot, NeurIPS 2020",
            link="https://arxiv.org/abs/2009.11094",
            saves="the search for the ticket; over channels, seconds, bytes, MACs and joules from the first step on",
            limits="time, over single weights, which are only masked; and a ticket that another task has found",
        ),
        MethodInfo(
            name="dynamic_sparse",
            path="earlybird.sparse.dynamic:DynamicSparse",
            citation="Evci et al., Rigging the Lottery: Making All Tickets Winners, ICML 2020; Mocanu et al., Scalable "
            "training of artificial neural networks with adaptive sparse connectivity, Nature Communications 2018",
            link="https://arxiv.org/abs/1911.11134",
            saves="stored weights; counted bit-MACs and modelled joules of hardware that skips zeros, in training, too",
            limits="time: zeros are multiplied like any other number; and runs too short for many exchanges",
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
        MethodInfo(
            name="layer_skipping",
            path="earlybird.skipping.layers:LayerSkipping",
            citation="Wang et al., E2-Train: Training State-of-the-art CNNs with Over 80% Energy Savings, NeurIPS 2019",
            link="https://arxiv.org/abs/1910.13349",
            saves="measured seconds, counted MACs and modelled joules of samples that go around a residual block",
            limits="shallow networks, blocks so cheap that copying samples takes as long, and GPUs that wait for gates",
            exported="The gates are not exported: the network runs every block, and was evaluated with gates.",
        ),
        MethodInfo(
            name="stochastic_depth",
            path="earlybird.skipping.stochastic_depth:StochasticDepth",
            citation="Huang et al., Deep Networks with Stochastic Depth, ECCV 2016",
            link="https://arxiv.org/abs/1603.09382",
            saves="measured seconds, counted MACs and modelled joules of training steps that leave blocks out",
            limits="shallow networks and short runs; inference is the whole network's",
        ),
        MethodInfo(
            name="progressive_precision",
            path="earlybird.precision.progressive:ProgressivePrecision",
            citation="Fu et al., FracTrain: Fractionally Squeezing Bit Savings Both Temporally and Spatially for "
            "Efficient DNN Training, NeurIPS 2020",
            link="https://arxiv.org/abs/2012.13113",
            saves="counted bit-MACs and modelled joules; with rungs int8, bf16 or fp32, measured seconds",
            limits="time, where bits are simulated: rounding takes longer than it saves",
            exported="The network is exported in full precision; it was evaluated with rounded operands.",
        ),
        MethodInfo(
            name="fractional_precision",
            path="earlybird.precision.fractional:FractionalPrecision",
            citation="Fu et al., FracTrain: Fractionally Squeezing Bit Savings Both Temporally and Spatially for "
            "Efficient DNN Training, NeurIPS 2020",
            link="https://arxiv.org/abs/2012.13113",
            saves="counted bit-MACs and modelled joules of hardware that changes its bits from sample to sample",
            limits="time: bits are simulated, and the gates' choices have to be computed",
            exported="The network is exported in full precision; it was evaluated with rounded operands.",
        ),
        MethodInfo(
            name="predictive_sign",
            path="earlybird.precision.predictive_sign:PredictiveSign",
            citation="Wang et al., E2-Train: Training State-of-the-art CNNs with Over 80% Energy Savings, NeurIPS 2019",
            link="https://arxiv.org/abs/1910.13349",
            saves="counted bit-MACs and modelled joules of hardware that multiplies most significant bits first",
            limits="time: both gradients are computed in simulation; and training that real gradients suit better",
            exported="The network is exported in full precision; it was evaluated with rounded operands.",
        ),
        MethodInfo(
            name="block_float",
            path="earlybird.precision.block_float:BlockFloat",
            citation="Yang et al., SWALP: Stochastic Weight Averaging in Low-Precision Training, ICML 2019",
            link="https://arxiv.org/abs/1904.11943",
            saves="counted bit-MACs and modelled joules of the search for a ticket, in 8-bit block floating point",
            limits="time: it is simulated; and runs in which the search is a small part",
        ),
        MethodInfo(
            name="shift_add",
            path="earlybird.arithmetic.shift_add:ShiftAdd",
            citation="You et al., ShiftAddNet: A Hardware-Inspired Deep Network, NeurIPS 2020",
            link="https://arxiv.org/abs/2010.12785",
            saves="modelled joules of hardware that has shifters and adders in fixed point, and bits of stored weights",
            limits="time: both kinds of layers take longer than a convolution on machines that multiply",
        ),
        MethodInfo(
            name="simclr",
            path="earlybird.pretraining.simclr:SimClr",
            citation="Chen, Kornblith, Norouzi, Hinton: A Simple Framework for Contrastive Learning of Visual "
            "Representations, ICML 2020",
            link="https://arxiv.org/abs/2002.05709",
            saves="labels; and the pre-training of every further task that starts from the same encoder or its ticket",
            limits="data whose images all have labels: training on them is more accurate and several times shorter",
            exported="The head is exported as it was drawn: the run trained the encoder before it.",
        ),
        MethodInfo(
            name="moco",
            path="earlybird.pretraining.moco:MoCo",
            citation="He et al., Momentum Contrast for Unsupervised Visual Representation Learning, CVPR 2020; "
            "Chen et al., Improved Baselines with Momentum Contrastive Learning, 2020",
            link="https://arxiv.org/abs/2003.04297",
            saves="labels; and against simclr the backward pass of one view, and large batches",
            limits="data whose images all have labels: training on them is more accurate and several times shorter",
            exported="The head is exported as it was drawn: the run trained the encoder before it.",
        ),
        MethodInfo(
            name="distillation",
            path="earlybird.tickets.distill:Distillation",
            citation="Ma et al., Good Students Play Big Lottery Better, 2021; Hinton, Vinyals, Dean: Distilling the "
            "Knowledge in a Neural Network, 2015",
            link="https://arxiv.org/abs/2101.03255",
            saves="nothing by itself: at the same accuracy a ticket may be smaller, which shows in its own columns",
            limits="teachers no better than the student; their passes cost, once an image and view or on each batch",
        ),
        MethodInfo(
            name="segmentation",
            path="earlybird.tasks.segmentation:Segmentation",
            citation="Long, Shelhamer, Darrell: Fully Convolutional Networks for Semantic Segmentation, CVPR 2015",
            link="https://arxiv.org/abs/1411.4038",
            saves="nothing by itself: it is a task, to try pre-trained weights and their tickets on",
            limits="thin structures, where the network halves the resolution at once",
            exported="The head that marks pixels is not in the file; the run's head.safetensors has it.",
        ),
        MethodInfo(
            name="detection",
            path="earlybird.tasks.detection:Detection",
            citation="Zhou, Wang, Kraehenbuehl: Objects as Points, 2019",
            link="https://arxiv.org/abs/1904.07850",
            saves="nothing by itself: it is a task, to try pre-trained weights and their tickets on",
            limits="images of several objects, or none",
            exported="The head that finds the object is not in the file; the run's head.safetensors has it.",
        ),
    )
}
