"""Who takes part in a comparison: checks on one ticket, or methods at several shares of the network.

The sanity checks on a ticket (Su et al., arXiv 2009.11094; Liu et al., arXiv 1810.05270): a dense run stopped at the
ticket's time, a small dense network of the ticket's cost, the ticket's widths with random channels, and the ticket with
its weights drawn anew.

A method takes part by the share that it keeps: its class names that key in ``KEEP_KEY``. One that passes through all
larger shares on its way to the smallest (iterative pruning, a round each) sets ``KEEPS_ALL_ON_THE_WAY``, and runs once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from earlybird.cost.count import count
from earlybird.errors import InputError, nearest
from earlybird.methods import METHODS, SHORT_NAMES
from earlybird.models import MODELS, build, takes_width
from earlybird.settings import check_share
from earlybird.step import Step
from earlybird.train.parts import read_data
from earlybird.train.recipe import Recipe, method_class

Done = Mapping[tuple[str, int], Mapping[str, Any]]
"""Rows of finished runs by contender and seed."""

CONTENDERS: dict[str, str] = {
    "dense": "the whole network, all epochs",
    "ticket": "the recipe as it is",
    "dense-equal-time": "the whole network, in as many epochs as take the ticket's time",
    "small-dense": "a narrower network from the start, with the MACs of the shrunk one",
    "ticket-shuffled": "the ticket's widths with channels chosen at random",
    "ticket-reinitialised": "the ticket's shape with weights drawn anew",
}
"""What can be compared with one ticket, and what each is."""

BASELINE = "dense"
_AFTER = ("dense-equal-time", "small-dense")
"""Those that need to know what dense and ticket of their seed took."""


@dataclass(frozen=True)
class Contender:
    """One that takes part.

    Attributes:
        name: Of its run folders, before the seed.
        about: What it is.
        recipe: Makes its recipe from a seed and the rows of finished runs.
        needs: Contenders of the same seed that have to be finished first.
        method: Name that it was asked for by; '' where no method was.
        keep: Share that was asked for, or None.
    """

    name: str
    about: str
    recipe: Callable[[int, Done], Recipe]
    needs: tuple[str, ...] = ()
    method: str = ""
    keep: float | None = None


def checks_on_a_ticket(recipe: Recipe, contenders: Sequence[str], seed: int) -> list[Contender]:
    """Return the contenders called for, dense among them, in the order of `CONTENDERS`.

    Args:
        recipe: Of the ticket.
        contenders: Of `CONTENDERS`.
        seed: One of those that will be run: what does not fit the methods is said now, not after hours.

    Raises:
        InputError: A name is unknown, there is nothing to compare with, or a contender does not fit the recipe.
    """
    for name in contenders:
        if name not in CONTENDERS:
            raise InputError(f"unknown contender '{name}'", needed=f"of {', '.join(CONTENDERS)}")
    asked = {BASELINE, *contenders}
    if asked == {BASELINE}:
        raise InputError("nothing to compare dense with", hint="add a contender, such as ticket")
    if asked & set(_AFTER):
        asked.add("ticket")
    if "small-dense" in asked and recipe.model not in MODELS and not takes_width(recipe.model):
        raise InputError(
            f"small-dense needs a width, which {recipe.model} does not take",
            hint="give the factory a keyword argument 'width', or leave small-dense out",
        )
    if recipe.dense:
        raise InputError("the recipe is dense (keep = 1)", needed="one with a ticket", hint="set keep below 1")

    def made(name: str) -> Contender:
        needs = (BASELINE, "ticket") if name in _AFTER else ()
        return Contender(name, CONTENDERS[name], lambda seed, done: check_recipe(recipe, name, seed, done), needs)

    found = [made(name) for name in CONTENDERS if name in asked]
    for contender in found:
        if not contender.needs:
            contender.recipe(seed, {})
    if "small-dense" in asked and "keep" not in recipe.settings:
        raise InputError(
            f"small-dense is as wide as a ticket, which {', '.join(recipe.method)} draws none of",
            hint="leave small-dense out",
        )
    return found


def check_recipe(recipe: Recipe, name: str, seed: int, done: Done) -> Recipe:
    """Return the recipe of a contender of `CONTENDERS`."""
    own = own_seed(recipe, seed)
    if name == "ticket":
        return own
    if name == "ticket-reinitialised":
        return own.replace(weights="reinitialise")
    if name == "ticket-shuffled":
        return own.replace(shuffle=True)
    if name == "dense":
        return own.replace(dense=True)
    dense, ticket = done["dense", seed], done["ticket", seed]
    if name == "small-dense":
        return own.replace(dense=True, width=width_of(own, ticket))
    return for_epochs(own.replace(dense=True), recipe.epochs * ticket["seconds"] / dense["seconds"])


def for_epochs(recipe: Recipe, epochs: float) -> Recipe:
    """Return a recipe that trains for so many epochs (to two decimals), with a schedule of the same shape."""
    epochs = max(round(epochs, 2), 0.01)
    share = epochs / recipe.epochs
    milestones = tuple(_scaled(point, share) for point in recipe.milestones)
    warmup, stem = (None if point is None else _scaled(point, share) for point in (recipe.lr_warmup, recipe.stem_until))
    return recipe.replace(epochs=epochs, milestones=milestones, lr_warmup=warmup, stem_until=stem)


def _scaled(point: Step, share: float) -> Step:
    return Step(Fraction(f"{float(point.epochs) * share:.6f}"), round(point.iterations * share), point.share)


def width_of(recipe: Recipe, ticket: Mapping[str, Any]) -> float:
    """Find the width at which a model from the start costs what the ticket costs after the draw."""
    wanted = ticket["macs_per_image_after"]
    if wanted is None:
        raise InputError(
            "small-dense needs a ticket that was drawn before the last step, with its MACs counted",
            hint="leave small-dense out, or set an earlier deadline",
        )
    data = read_data(recipe)
    images = data.train_images[:1].float()

    def cost(width: float) -> int:
        model = build(
            recipe.model,
            classes=len(data.classes),
            in_channels=images.shape[1],
            image_size=images.shape[2],
            width=width,
        )
        return count(model, images).training_macs

    low, high = 0.0, recipe.width  # channels come whole, so the cost is a staircase
    for _ in range(10):
        middle = round((low + high) / 2, 4)
        low, high = (low, middle) if cost(middle) > wanted else (middle, high)
    return min([width for width in (low, high) if width > 0], key=lambda width: abs(cost(width) - wanted))


def resolve(name: str) -> tuple[str, dict[str, Any]]:
    """Return the method that people mean by ``name``, and the settings that make it so.

    Raises:
        InputError: No method is called that, or it keeps no share of the network that could be chosen.
    """
    plain = _plain(name)
    method, settings = SHORT_NAMES.get(plain, (plain, {}))
    known = [*(short for short, (long, _) in SHORT_NAMES.items() if long in METHODS), *filter(keep_key, METHODS)]
    if method not in METHODS:
        raise InputError(f"unknown method '{name}'", needed=f"of {', '.join(known)}", hint=nearest(plain, known))
    if not keep_key(method):
        raise InputError(f"{method} has no share that stays, which could be compared", needed=f"of {', '.join(known)}")
    return method, dict(settings)


def _plain(name: str) -> str:
    return name.strip().lower().replace("-", "_")


def keep_key(method: str) -> str:
    """Return the key of the share that a method keeps; '' for one that keeps all."""
    return getattr(method_class(method), "KEEP_KEY", "")


def methods_at_shares(recipe: Recipe, methods: Sequence[str], keeps: Sequence[float]) -> list[Contender]:
    """Return dense, and each method at each share; one that passes through them all comes once, at the smallest.

    Args:
        recipe: What all have in common. Settings of methods count for those that have them; methods of the recipe that
            keep the whole network go along with each contender.
        methods: Names as for `resolve`.
        keeps: Shares that stay, each in (0, 1).

    Raises:
        InputError: A method is unknown or named twice, a share is out of range, or a method cannot keep it.
    """
    methods = [name for name in methods if name != BASELINE]
    shares = sorted({check_share("keep", keep) for keep in keeps}, reverse=True)
    if not methods or not shares:
        missing = "shares" if methods else "methods"
        raise InputError(f"no {missing} to compare", hint="name some: --methods imp,snip --keep 0.5,0.2")
    if shares[0] == 1:
        raise InputError("keep = 1 is dense, which takes part anyway", needed="shares below 1")
    along = tuple(name for name in recipe.method if not keep_key(name))
    decides = next((name for name in along if getattr(method_class(name), "DECIDES", False)), None)
    if decides:
        raise InputError(
            f"{decides} decides already which units stay, so no other method can",
            needed="a recipe of what the methods have in common",
            hint=f"leave {decides} out of its methods",
        )
    found = [Contender(BASELINE, CONTENDERS[BASELINE], lambda seed, done: own_seed(recipe.replace(dense=True), seed))]
    seen: dict[str, str] = {}
    for typed in methods:
        method, settings = resolve(typed)
        for keep in shares[-1:] if getattr(method_class(method), "KEEPS_ALL_ON_THE_WAY", False) else shares:
            changes = {"dense": False, "method": (method, *along), **settings, keep_key(method): keep}
            try:
                own = recipe.replace(**changes)
            except InputError as error:
                raise InputError(
                    f"{typed} cannot keep {keep:g}: {error.found}", needed=error.needed, hint=error.hint
                ) from error
            twin = seen.setdefault(own.hash(), typed)
            if twin != typed or methods.count(typed) > 1:
                raise InputError(f"{twin} and {typed} are the same contender", needed="each method once")
            about, short = f"{', '.join((method, *along))} keeps {keep:g}", _plain(typed)
            found.append(Contender(f"{short}-{keep:g}", about, _with_seed(own), method=short, keep=keep))
    return found


def _with_seed(recipe: Recipe) -> Callable[[int, Done], Recipe]:
    return lambda seed, done: own_seed(recipe, seed)


def own_seed(recipe: Recipe, seed: int) -> Recipe:
    """Return a contender's recipe for one seed; where it goes is the comparison's matter."""
    return recipe.replace(seed=seed, out=None)
