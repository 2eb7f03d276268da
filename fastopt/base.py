"""Groups, hyper-parameters and freezing: what every optimizer here has, whatever it does in a step."""

from __future__ import annotations

import difflib
import functools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar, TypeVar, cast

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import optimizer as torch_optimizer

from .bare import bare_optimizer
from .checks import group_number
from .hypers import (
    GroupsView,
    HyperNames,
    HyperView,
    check_name,
    group_values,
    hyper_names,
    same_tensor_everywhere,
    set_item_pg,
)
from .pieces import Box
from .spread import box_of, is_spread
from .state import ParamState, flags_of

F = TypeVar("F", bound=Callable[..., Any])


def outside_compile(function: F) -> F:
    """Keep `function` out of torch.compile's graphs: a step is a program of its own.

    Dynamo comes in only where it is tracing, for each pass through its guard takes microseconds.
    """
    outside = torch._disable_dynamo(function)  # type: ignore[attr-defined]

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return (outside if torch.compiler.is_compiling() else function)(*args, **kwargs)

    return cast(F, call)


class _BaseOptimizer(torch.optim.Optimizer):
    """Groups, hyper-parameters, freezing and the state mapping, shared by everything here that is an optimizer.

    `param_groups` holds the truth, in PyTorch's names; `hypers` and `param_lists` are live views of it.
    """

    #: Stored name to hyper, see `HyperNames`. Empty: the groups hold the names that the callbacks use.
    hp_map: Mapping[str, str] = {}
    #: Attributes beside `defaults`, `state` and `param_groups` that deepcopy and pickle keep.
    _kept: ClassVar[tuple[str, ...]] = ("_freeze_to",)
    _freeze_to = 0

    @staticmethod
    def profile_hook_step(func: Callable[..., Any]) -> Callable[..., Any]:
        """Torch's wrapper of `step`, for its hooks and the profiler; gone through only where one of those is there."""
        observed = torch.optim.Optimizer.profile_hook_step(func)

        @functools.wraps(func)
        def step(self: _BaseOptimizer, *args: Any, **kwargs: Any) -> Any:
            return (observed if _is_observed(self) else func)(self, *args, **kwargs)

        return step

    # ---- groups and hyper-parameters

    @property
    def _names(self) -> HyperNames:
        return hyper_names(tuple(self.hp_map.items()))

    @property
    def hypers(self) -> GroupsView[HyperView]:
        """One live mapping per group, from hyper to value, with the names that callbacks use."""

        def put(i: int, values: Mapping[str, Any]) -> None:
            for name, value in values.items():
                self._hyper_view(i)[name] = value

        return GroupsView(lambda: len(self.param_groups), self._hyper_view, put)

    def _hyper_view(self, i: int) -> HyperView:
        return HyperView(lambda: self.param_groups[i], self._names)

    def hypers_of(self, i: int) -> dict[str, Any]:
        """What every callback of group `i` receives as keywords, as a new dict."""
        return self._names.hypers(self.param_groups[i])

    @property
    def param_lists(self) -> GroupsView[list[Any]]:
        """The parameters of each group: live lists, assignable one by one or all together."""

        def put(i: int, params: Iterable[Any]) -> None:
            self.param_groups[i]["params"] = list(params)

        return GroupsView(lambda: len(self.param_groups), lambda i: self.param_groups[i]["params"], put)

    @param_lists.setter
    def param_lists(self, lists: Iterable[Iterable[Any]]) -> None:
        self.param_lists[:] = [list(params) for params in lists]

    def set_hyper(self, k: str, v: Any) -> None:
        """Set hyper-parameter `k` in every group: one value, one per group, or a slice.

        Raises:
            ValueError: the number of values is not the number of groups, or a value is out of range.

        Examples:
            >>> from fastopt import Adam
            >>> from torch import ones
            >>> opt = Adam([[ones(1)], [ones(1)], [ones(1)]])
            >>> opt.set_hyper("lr", slice(1e-2))
            >>> [hyper["lr"] for hyper in opt.hypers]
            [0.001, 0.001, 0.01]
        """
        self.set_hypers(**{k: v})

    def _write_hyper(self, k: str, values: list[Any]) -> None:
        """Store one value per group; a tensor stays the same object and takes the number, as schedulers do."""
        shared = same_tensor_everywhere(self.param_groups, k)
        for group, value in zip(self.param_groups, values, strict=True):
            old = group.get(k)
            if isinstance(old, Tensor) and not isinstance(value, Tensor):
                if shared and any(other != values[0] for other in values):
                    group[k] = old = old.clone()
                old.fill_(value)
            else:
                set_item_pg(group, self._names.stored_name(k, group), value)

    def set_hypers(self, **kwargs: Any) -> None:
        """`set_hyper` for each keyword; nothing is set if one of them cannot be."""
        planned = [item for k, v in kwargs.items() for item in self._per_group(k, v).items()]
        for k, values in planned:
            self._write_hyper(k, values)

    def _per_group(self, k: str, v: Any) -> dict[str, list[Any]]:
        """Checked values, one per group, of the hyper or hypers that `k` names in either spelling."""
        check_name(k)
        stored = self.param_groups[0].get(k) if self.param_groups else None
        if isinstance(stored, tuple) and k not in (items := self._names.hypers({k: stored})):
            # such as betas=(0.9, 0.99): one value for every group, not one per group
            if not isinstance(v, list | tuple) or len(v) != len(stored) or any(map(_is_collection, v)):
                raise ValueError(
                    f"{k}={v!r}, expected one number for each of {', '.join(items)}, the same in all groups"
                )
            given = dict(zip(items, v, strict=True))
        else:
            given = {k if k in self.hp_map.values() else self.hp_map.get(k, k): v}
        found = {name: group_values(name, value, len(self.param_groups)) for name, value in given.items()}
        for name, values in found.items():
            for i, value in enumerate(values):
                self._check_hyper(name, value, i)
            self._warn_of_typo(name)
        return found

    def _warn_of_typo(self, name: str) -> None:
        """Say so where a new hyper-parameter is spelled nearly like one that is there: new ones are no error."""
        if self.param_groups and not self._names.known(name, self.param_groups[0]):
            known = [*self._hyper_view(0), *self.hp_map]
            for near in difflib.get_close_matches(name, known, n=1, cutoff=0.8):
                warnings.warn(f"{name!r} is a new hyper-parameter, did you mean {near!r}?", stacklevel=5)

    def _check_hyper(self, name: str, value: Any, group: int) -> None:
        """Raise if `value` cannot be hyper `name`; the general optimizer takes everything."""

    def _check_group(self, group: Mapping[str, Any], i: int) -> None:
        """Raise if anything in `group`, which is or becomes the `i`-th, cannot be what it is."""
        for name, value in {**group, **self._names.hypers(group)}.items():
            self._check_hyper(name, value, i)

    def param_names(self) -> dict[Any, str]:
        """Names by parameter, where the groups carry names (`named_parameters()` was passed), else an empty dict."""
        return {
            p: name
            for group in self.param_groups
            for p, name in zip(group["params"], group.get("param_names", ()), strict=False)
        }

    def all_params(
        self, n: int | slice | Iterable[int] = slice(None), with_grad: bool = False
    ) -> list[tuple[Any, list[Any], dict[str, Any], HyperView]]:
        """Tuples (parameter, its group's list, its state, its hypers), all live, of the groups `n`.

        Args:
            n: an index, a slice or several indices of groups.
            with_grad: only parameters that have a gradient.
        """
        indices = list(range(len(self.param_groups)))
        chosen = [indices[n]] if isinstance(n, int) else indices[n] if isinstance(n, slice) else [indices[i] for i in n]
        return [
            (p, self.param_groups[i]["params"], self.state[p], self._hyper_view(i))
            for i in chosen
            for p in self.param_groups[i]["params"]
            if not with_grad or getattr(p, "grad", None) is not None
        ]

    # ---- freezing

    def is_frozen(self, i: int) -> bool:
        """Whether group `i` is frozen."""
        return bool(self.param_groups[i].get("frozen", False))

    def steps_on(self, i: int, p: Any) -> bool:
        """Whether parameter `p` of group `i` steps when it has a gradient."""
        return not self.is_frozen(i) or self._is_forced(i, p)

    def _is_forced(self, i: int, p: Any) -> bool:
        """Whether `p` trains although its group is frozen: it is marked, and the marks of the group count."""
        marked = bool(self.state.get(p, {}).get("force_train", False))
        return marked and self.param_groups[i].get("frozen") != "all"

    @property
    def frozen_idx(self) -> int:
        """The number last given to `freeze_to` (negative ones counted from the end), or how many groups are frozen
        from the first on if the freezing has changed otherwise."""
        n_groups = len(self.param_groups)
        leading = next((i for i in range(n_groups) if not self.is_frozen(i)), n_groups)
        return self._freeze_to if min(max(self._freeze_to, 0), n_groups) == leading else leading

    def set_freeze(self, n: int, rg: bool, ignore_force_train: bool = False) -> None:
        """Freeze (`rg=False`) or unfreeze (`rg=True`) group `n` only.

        Parameters marked `force_train` stay trainable in a frozen group unless `ignore_force_train`.

        Raises:
            IndexError: there is no group `n`.
        """
        n_groups = len(self.param_groups)
        i = group_number(n, "set_freeze()")
        if not -n_groups <= i < n_groups:
            raise IndexError(f"set_freeze({n}): there is no group {n}, the optimizer has {n_groups}")
        i %= n_groups
        self._check_freezable([i])
        self._freeze_group(i, False if rg else "all" if ignore_force_train else True)

    def _freeze_group(self, i: int, frozen: bool | str) -> None:
        """Store the freezing of group `i` (False, True, or 'all' where no mark counts) and tell autograd of it."""
        group = self.param_groups[i]
        if frozen:
            group["frozen"] = frozen
        else:
            group.pop("frozen", None)
        for p in tensors_of(group):
            p.requires_grad_(not frozen or self._is_forced(i, p))

    def _check_freezable(self, indices: Iterable[int]) -> None:
        for i in indices:
            for j, p in enumerate(self.param_groups[i]["params"]):
                if isinstance(p, Tensor) and not (p.is_leaf and (p.is_floating_point() or p.is_complex())):
                    raise RuntimeError(
                        f"params[{j}] of group {i} ({p.dtype}) cannot require a gradient, so freezing has no meaning: "
                        f"only floating-point leaf tensors can be frozen and unfrozen"
                    )

    def freeze_to(self, n: int) -> None:
        """Freeze the groups before `n` and unfreeze the others; a negative `n` counts from the end.

        A frozen parameter does not move, whatever gradient is left in it, except those marked `force_train`.
        """
        n_groups = len(self.param_groups)
        n = group_number(n, "freeze_to()")
        n = n if n >= 0 else n_groups + n
        self._check_freezable(range(n_groups))
        if n >= n_groups:
            warnings.warn(f"Freezing {n} groups; model has {n_groups}; whole model is frozen.", stacklevel=2)
        for i in range(n_groups):
            self._freeze_group(i, frozen=i < n)
        self._freeze_to = n

    def freeze(self) -> None:
        """Freeze all groups but the last.

        Raises:
            ValueError: there is only one group.
        """
        if len(self.param_groups) < 2:
            raise ValueError(
                "freeze() trains the last group only, but there is just one: pass several, or freeze_to(1)"
            )
        self.freeze_to(-1)

    def unfreeze(self) -> None:
        """Unfreeze all groups."""
        self.freeze_to(0)

    # ---- gradients and state

    @outside_compile
    def zero_grad(self, set_to_none: bool | None = None) -> None:
        """Drop or zero the gradients.

        Args:
            set_to_none: True drops them, False zeroes them in place. By default a gradient that autograd makes anew, or
                left on a parameter that has been frozen, is dropped, and one that was put on a tensor outside autograd
                is zeroed in place.
        """
        with torch.autograd.profiler.record_function(self._zero_grad_profile_name):
            for group in self.param_groups:
                for p in tensors_of(group):
                    if p.grad is None:
                        continue
                    if p.requires_grad or isinstance(p, Parameter) if set_to_none is None else set_to_none:
                        p.grad = None
                    else:
                        p.grad.detach_() if p.grad.grad_fn is not None else p.grad.requires_grad_(False)
                        p.grad.zero_()

    def clear_state(self) -> None:
        """Forget all training state; the marks `force_train` and `do_wd` stay."""
        kept = ParamState.of((p, marks) for p, entry in self.state.items() if (marks := flags_of(entry)))
        bare_optimizer(self).state = kept

    def boxes(self, p: Tensor, shape: tuple[int, ...]) -> list[Box]:
        """Which boxes of a state of `p` with global `shape` this process holds: all of it, or a part of a DTensor."""
        if not is_spread(p) or tuple(shape) != tuple(p.shape):
            return [Box.whole(shape)]
        box = box_of(p)
        return [box] if box.numel else []

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), **{name: getattr(self, name) for name in self._kept}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        plain = "differentiable" in state.get("defaults", getattr(self, "defaults", {}))
        super().__setstate__(state)
        if not plain:  # torch adds its own switch to the defaults of whatever it unpickles
            self.defaults.pop("differentiable", None)
        if not isinstance(self.state, ParamState):
            self.state = ParamState(self.state)
        self.state.admit_marks()


def _is_observed(opt: Any) -> bool:
    """Whether a profiler runs, or a hook of `step` is registered on `opt` or on all optimizers."""
    return bool(
        opt._optimizer_step_pre_hooks
        or opt._optimizer_step_post_hooks
        or torch_optimizer._global_optimizer_pre_hooks
        or torch_optimizer._global_optimizer_post_hooks
        or torch.autograd.profiler._is_profiler_enabled
        or torch._C._autograd._profiler_enabled()
    )


def _is_collection(value: Any) -> bool:
    """Whether `value` is several values, or a slice, instead of one."""
    return isinstance(value, Iterable | slice) and not isinstance(value, str) and getattr(value, "ndim", 1) != 0


def tensors_of(group: Mapping[str, Any]) -> Iterator[Tensor]:
    """The tensors among a group's members, which may hold plain numbers too."""
    return (p for p in group["params"] if isinstance(p, Tensor))
