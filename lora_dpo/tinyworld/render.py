"""Draws scenes with signed distance fields: anti-aliased edges, outlines and soft shadows from one function."""

from __future__ import annotations

import colorsys
import functools

import numpy as np

from .scenes import BACKGROUNDS, COLOURS, SIZE, Placed, Scene

GRID, REACH = 192, 2.6  # resolution of the precomputed fields, and how far they reach in radii
LIGHT = np.array([-0.6, -0.8])  # the direction the light comes from: above, a little to the left


def outline(shape: str) -> np.ndarray:
    """The polygon of a shape in units of its radius, y downwards: [points, 2]. All shapes cover similar areas."""
    if shape == "circle":
        a = np.linspace(0, 2 * np.pi, 72, endpoint=False)
        return np.stack([np.cos(a), np.sin(a)], 1)
    if shape == "square":
        return np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * 0.88
    if shape == "triangle":
        return np.array([[0, -1.08], [1.06, 0.84], [-1.06, 0.84]])
    if shape == "star":
        a = -np.pi / 2 + np.arange(10) * np.pi / 5
        r = np.where(np.arange(10) % 2 == 0, 1.14, 0.5)
        return np.stack([r * np.cos(a), r * np.sin(a)], 1)
    if shape == "heart":
        t = np.linspace(0, 2 * np.pi, 64, endpoint=False)
        x = 16 * np.sin(t) ** 3
        y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
        return np.stack([x, y - 1.5], 1) / 15.5
    if shape == "cross":
        w, e = 0.36, 1.04
        quarter = [(-w, -w), (-w, -e), (w, -e)]  # one arm; turned by 90° three times
        corners = [p for k in range(4) for p in (_turned(q, k) for q in quarter)]
        return np.array(corners)
    raise ValueError(f"no such shape: {shape!r}")


def _turned(point: tuple[float, float], quarters: int) -> tuple[float, float]:
    x, y = point
    for _ in range(quarters):
        x, y = -y, x
    return x, y


@functools.cache
def field(shape: str) -> np.ndarray:
    """Signed distance to a shape's edge in radii, negative inside, on a grid reaching `REACH` radii: [GRID, GRID]."""
    points = outline(shape)
    ends = np.roll(points, -1, 0)
    axis = np.linspace(-REACH, REACH, GRID)
    p = np.stack(np.meshgrid(axis, axis), -1)[..., None, :]  # [y, x, 1, 2]
    edge = ends - points
    along = np.clip(((p - points) * edge).sum(-1) / (edge**2).sum(-1), 0, 1)
    distance = np.sqrt((((p - points) - along[..., None] * edge) ** 2).sum(-1)).min(-1)
    x, y = p[..., 0], p[..., 1]
    spans = (points[:, 1] > y) != (ends[:, 1] > y)
    with np.errstate(divide="ignore", invalid="ignore"):
        crossing = points[:, 0] + (y - points[:, 1]) * edge[:, 0] / edge[:, 1]
    inside = (spans & (x < crossing)).sum(-1) % 2 == 1
    return np.where(inside, -distance, distance).astype(np.float32)


def distance(placed: Placed, dx: float = 0.0, dy: float = 0.0) -> np.ndarray:
    """Signed distance in pixels to the edge of an object, shifted by (dx, dy), at every pixel centre: [SIZE, SIZE]."""
    axis = np.arange(SIZE) + 0.5
    x, y = np.meshgrid((axis - placed.x - dx) / placed.radius, (axis - placed.y - dy) / placed.radius)
    c, s = np.cos(placed.turn), np.sin(placed.turn)
    u, v = ((k + REACH) / (2 * REACH) * (GRID - 1) for k in (c * x + s * y, -s * x + c * y))
    u, v = np.clip(u, 0, GRID - 1.001), np.clip(v, 0, GRID - 1.001)
    i, j = v.astype(int), u.astype(int)
    fv, fu = v - i, u - j
    grid = field(placed.item.shape)
    top = grid[i, j] * (1 - fu) + grid[i, j + 1] * fu
    bottom = grid[i + 1, j] * (1 - fu) + grid[i + 1, j + 1] * fu
    return (top * (1 - fv) + bottom * fv) * placed.radius


def colour(name: str, vividness: float) -> np.ndarray:
    """RGB of a named colour, muted (saturation .62) to vivid (.96)."""
    saturation = 0.62 + 0.34 * vividness
    value = 0.86 + 0.1 * vividness
    return np.array(colorsys.hsv_to_rgb(COLOURS[name] / 360, saturation, value))


def render(scene: Scene) -> np.ndarray:
    """The picture of a scene: uint8 [SIZE, SIZE, 3]."""
    hue, saturation, value = BACKGROUNDS[scene.background]
    image = np.broadcast_to(np.array(colorsys.hsv_to_rgb(hue / 360, saturation, value)), (SIZE, SIZE, 3)).copy()
    axis = np.arange(SIZE) + 0.5
    px, py = np.meshgrid(axis, axis)
    if scene.style == "shaded":
        for placed in scene.objects:
            shadow = np.clip(0.5 - distance(placed, 1.6, 2.6) / 4.0, 0, 1)[..., None]
            image *= 1 - 0.30 * shadow
    for placed in scene.objects:
        d = distance(placed)
        rgb = np.broadcast_to(colour(placed.item.colour, scene.vividness), image.shape)
        if placed.item.texture:
            rgb = rgb * (1 - 0.5 * _pattern(placed, px, py))[..., None]
        if scene.style == "shaded":
            ball = ((px - placed.x) * LIGHT[0] + (py - placed.y) * LIGHT[1]) / placed.radius  # -1 in shade … 1 in light
            rgb = rgb * (1.0 - 0.42 * np.clip(0.25 - ball, 0, 1.2))[..., None]
            glow = np.exp(
                -(((px - placed.x) / placed.radius + 0.32) ** 2 + ((py - placed.y) / placed.radius + 0.42) ** 2) / 0.10
            )
            rgb = rgb + (1 - rgb) * (0.42 * glow)[..., None]
        elif scene.style == "outlined":
            rim = np.clip(0.5 + (d + 1.7), 0, 1)[..., None]
            rgb = rgb * (1 - 0.74 * rim)
        cover = np.clip(0.5 - d, 0, 1)[..., None]
        image = image * (1 - cover) + rgb * cover
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)


def _pattern(placed: Placed, px: np.ndarray, py: np.ndarray) -> np.ndarray:
    """Where a texture is dark: 0 … 1 at every pixel."""
    pitch = max(5.0, placed.radius / 2.2)
    x, y = px - placed.x, py - placed.y
    if placed.item.texture == "striped":
        wave = np.cos(2 * np.pi * (x + y) / (1.414 * pitch))
        return np.clip(0.5 + wave * pitch / 3.2, 0, 1)
    pitch *= 1.25
    row = np.floor(y / (0.866 * pitch) + 0.5)
    shift = np.where(row % 2 == 0, 0.0, 0.5) * pitch
    dx = (x + shift + pitch / 2) % pitch - pitch / 2
    dy = y - row * 0.866 * pitch
    return np.clip(0.5 + (0.29 * pitch - np.hypot(dx, dy)), 0, 1)
