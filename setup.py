"""Which packages there are, by rule: `integrations/` is installed inside of `salora_plugins`. See pyproject.toml."""

from setuptools import find_packages, setup

INSIDE = "salora_plugins.integrations"

setup(
    packages=[
        *find_packages(include=["salora_plugins", "salora_plugins.*"], exclude=[INSIDE, f"{INSIDE}.*"]),
        *(f"salora_plugins.{name}" for name in find_packages(include=["integrations", "integrations.*"])),
    ],
    package_dir={INSIDE: "integrations"},
)
