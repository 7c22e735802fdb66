"""Packages of the wheel; everything else stands in pyproject.toml, which cannot map a folder to another place."""

from setuptools import find_packages, setup

setup(
    # `configs` is shipped inside the package, where `scmdm.config.shipped` finds it without a checkout.
    packages=[*find_packages(include=["scmdm*", "data_prep*"]), "scmdm.configs"],
    package_dir={"scmdm.configs": "configs"},
)
