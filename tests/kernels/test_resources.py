"""What every kernel may cost on sm_80, sm_90 and sm_100: no spills, shared memory that is there, the widest instructions."""

from __future__ import annotations

import pytest
from compiling import SHARED_LIMIT, Code, code_of
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
    """The heaviest of each launcher, for every capability in bf16 and in every dtype for sm_90."""
    rows = resources("heaviest")
    assert {row.kernel for row in rows} == {case.kernel for case in kernel_cases()}
    assert {row.capability for row in rows} == set(SHARED_LIMIT)
    assert not over_budget(rows), "\n".join(over_budget(rows))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["cases", "candidates", "few"])
def test_every_case_and_candidate_is_within_its_budget(mode: Mode) -> None:
    """What an autotuner may pick must not spill either; and by default issuing takes no longer than memory or products do.

    But for a tenth: compilers differ.
    """
    rows = resources(mode)
    assert not over_budget(rows), "\n".join(over_budget(rows))
    if mode == "cases":
        default = {case.name for case in kernel_cases() if case.count}
        seen = [row for row in rows if row.issue and row.case in default]
        assert {row.case for row in seen} == default
        slow = [row for row in seen if row.issue > 1.1 * row.predicted]
        assert not slow, "\n".join(f"{row.case}: {row.issue * 1e6:.1f} of {row.predicted * 1e6:.1f} µs" for row in slow)


def test_what_a_warp_issues_is_read_from_machine_code() -> None:
    names = ["LDC R1, c[0x0][0x28]", "@!P0 IADD3 R0, R0, 0x1, RZ", "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24, gsb0",
             "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24", "@P6 BRA 0x10", "EXIT", "BRA 0x60", "NOP"]  # fmt: skip
    listing = "".join(f"        /*{16 * place:04x}*/   {name} ;  /* 0x00 */\n" for place, name in enumerate(names))
    found = code_of(listing)
    assert found == Code(outside=3, looped=4, flops=2 * 2 * 16 * 128 * 16)
    assert found.issued(8, 8 * found.flops * 5) == 8 * (3 + 5 * 4)
    assert Code(3, 4, 0).issued(8, 0) == 8 * 7


def test_a_heaviest_case_for_every_kernel() -> None:
    kernels = {case.name: case.kernel for case in kernel_cases()}
    assert {kernels[name] for name in HEAVIEST} == set(kernels.values())


def test_the_table_lists_every_kernel() -> None:
    """`python bench/kernel_table.py` writes it."""
    table = (ROOT / "kernels" / "README.md").read_text()
    missing = [kernel for kernel in sorted({case.kernel for case in kernel_cases()}) if f"`{kernel}`" not in table]
    assert not missing, f"kernels/README.md says nothing of {', '.join(missing)}"
