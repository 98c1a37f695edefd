# SPDX-License-Identifier: GPL-2.0-or-later
"""The parts of scripts/power-cut: see its head."""
