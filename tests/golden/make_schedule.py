"""Golden tables of the paper's schedule, in 60-digit decimal arithmetic straight from eq. 4 and 7.

Imports nothing of the project: `python tests/golden/make_schedule.py > tests/golden/schedule.json`.
"""

import json
from decimal import Decimal, getcontext

getcontext().prec = 60
T, FIRST, LAST = 1000, Decimal("0.0001"), Decimal("0.02")
SHOWN = [0, 1, 2, 10, 100, 499, 500, 998, 999]

betas = [FIRST + (LAST - FIRST) * t / (T - 1) for t in range(T)]
bars, product = [], Decimal(1)
for beta in betas:
    product *= 1 - beta
    bars.append(product)

rows = {}
for t in SHOWN:
    before = bars[t - 1] if t else Decimal(1)
    rows[t] = {
        "betas": betas[t],
        "alphas_cumprod": bars[t],
        "sqrt_one_minus_alphas_cumprod": (1 - bars[t]).sqrt(),
        "sqrt_recip_alphas_cumprod": 1 / bars[t].sqrt(),
        "posterior_variance": betas[t] * (1 - before) / (1 - bars[t]),
        "posterior_mean_coef1": betas[t] * before.sqrt() / (1 - bars[t]),
        "posterior_mean_coef2": (1 - before) * (1 - betas[t]).sqrt() / (1 - bars[t]),
    }
print(json.dumps({t: {k: str(+v)[:40] for k, v in row.items()} for t, row in rows.items()},
                 indent=1))
