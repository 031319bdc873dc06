"""What a module of this package answers for names that it does not have."""

from collections.abc import Callable


def absent_names(module: str) -> Callable[[str], type]:
    """A `__getattr__` of a module: any public name is a class that cannot be instantiated.

    Raises:
        AttributeError: the name is special; Python and inspection ask for those everywhere.
    """

    def __getattr__(name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(f"module {module!r} has no attribute {name!r}")

        def refuse(*arguments: object, **options: object) -> None:
            raise ImportError(
                f"{module}.{name} was used, but torchvision is not installed here: "
                "torchvision-absent only lets text models be imported. Install torchvision."
            )

        return type(name, (), {"__module__": module, "__new__": refuse})

    return __getattr__
