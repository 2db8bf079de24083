"""The words of spectra-tiny's world: what a widget can be, which colours it can have, what can be written on it."""

from __future__ import annotations

ICONS = ("circle", "square", "triangle", "star", "diamond", "cross")
"""Shapes without a label."""

LABELLED = ("button", "checkbox", "field")
"""Widgets that carry one of `LABELS`."""

KINDS = ICONS + LABELLED

COLOURS = {
    "red": (220, 38, 38),
    "orange": (245, 130, 20),
    "yellow": (240, 210, 30),
    "green": (40, 160, 60),
    "cyan": (40, 195, 205),
    "blue": (40, 90, 225),
    "purple": (130, 50, 175),
    "pink": (245, 130, 190),
}
"""Colour words and their RGB values; a screen varies them slightly."""

LABELS = (
    "Login",
    "Search",
    "Cancel",
    "Save",
    "Open",
    "Close",
    "Help",
    "Send",
    "Back",
    "Next",
    "Home",
    "Print",
    "Delete",
    "Edit",
    "Copy",
    "Share",
    "Upload",
    "Settings",
    "Menu",
    "Play",
)
"""What can be written on a button, in a field, or beside a check box."""
