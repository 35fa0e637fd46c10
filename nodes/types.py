"""Sockets that only this pack has."""

from comfy_api.latest import io

StemBasis = io.Custom("STEM_BASIS")
StemTrajectory = io.Custom("STEM_TRAJECTORY")
