"""What every kernel may cost on sm_80, sm_90 and sm_100: no spills, shared memory that is there, the widest instructions."""

from __future__ import annotations

import pytest
from compiling import SHARED_LIMIT
from resources import HEAVIEST, ROOT, Mode, Row, resources

from cases import kernel_cases


def over_budget(rows: list[Row]) -> list[str]:
    """What is wrong with each row that breaks a budget."""
    found = []
    for row in rows:
        broken = {
            f"{row.stack} bytes of stack": row.stack > 0,
            f"{row.shared} bytes of shared memory": row.shared > SHARED_LIMIT[row.capability],
            f"{row.narrowest} bytes an access": row.wants_wide and row.narrowest < 16,
            "no wgmma": row.wants_wgmma and not row.wgmma,
        }
        where = f"{row.case} ({row.function}, {row.dtype}, sm_{row.capability}"
        tile = f"{row.rows} × {row.columns} × {row.inner}, {row.warps} warps, {row.stages} stages)"
        found += [f"{where}, {tile}: {what}" for what, is_broken in broken.items() if is_broken]
    return found


def test_each_kernel_and_epilogue_is_within_its_budget() -> None:
    """Every variant for sm_90 in bf16, and the heaviest of each launcher for every capability and dtype."""
    rows = resources("heaviest")
    assert {row.kernel for row in rows} == {case.kernel for case in kernel_cases()}
    assert {row.capability for row in rows} == set(SHARED_LIMIT)
    assert not over_budget(rows), "\n".join(over_budget(rows))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["cases", "candidates", "few"])
def test_every_case_and_candidate_is_within_its_budget(mode: Mode) -> None:
    """What an autotuner may pick must not spill either."""
    rows = resources(mode)
    assert not over_budget(rows), "\n".join(over_budget(rows))


def test_a_heaviest_case_for_every_kernel() -> None:
    kernels = {case.name: case.kernel for case in kernel_cases()}
    assert {kernels[name] for name in HEAVIEST} == set(kernels.values())


def test_the_table_lists_every_kernel() -> None:
    """`python bench/kernel_table.py` writes it."""
    table = (ROOT / "kernels" / "README.md").read_text()
    missing = [kernel for kernel in sorted({case.kernel for case in kernel_cases()}) if f"`{kernel}`" not in table]
    assert not missing, f"kernels/README.md says nothing of {', '.join(missing)}"
