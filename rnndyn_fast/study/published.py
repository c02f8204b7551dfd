"""Published numbers: Thorat, Doerig & Kietzmann (2023), arXiv 2308.12435; MiniEcoset testplus, 25,000 images, T = 10."""

from __future__ import annotations

# Averages over steps, two columns per measure: already stable and not yet; of those not yet, own and others' final class.
AVERAGES: dict[str, dict[str, tuple[float, float]]] = {
    "lateral_additive": {
        "norm_now_vs_later": (8.035, 7.449),
        "cos_current_now_vs_later": (0.2020, 0.1209),
        "cos_final_vs_other": (0.0999833, -0.0235295),
    },
    "topdown_additive": {
        "norm_now_vs_later": (22.993, 22.435),
        "cos_current_now_vs_later": (0.0617, 0.0140),
        "cos_final_vs_other": (0.0029617, -0.0740004),
    },
    "lateral_multiplicative": {
        "norm_now_vs_later": (24.148, 23.581),
        "cos_current_now_vs_later": (0.1358, 0.0710),
        "cos_final_vs_other": (0.0516290, -0.0323338),
    },
    "topdown_multiplicative": {
        "norm_now_vs_later": (22.434, 21.827),
        "cos_current_now_vs_later": (0.0878, 0.0327),
        "cos_final_vs_other": (0.0168386, -0.0655417),
    },
}
# Trajectories per group, in the order of GROUPS.
GROUP_COUNTS = {"lateral_additive": (12_418, 9_850, 1_295, 1_437)}
