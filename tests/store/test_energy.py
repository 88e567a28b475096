import pytest

from bise.store.energy import RaplMeter


def _zone(folder, name, energy, limit=1000):
    zone = folder / name
    zone.mkdir()
    (zone / "energy_uj").write_text(f"{energy}\n")
    (zone / "max_energy_range_uj").write_text(f"{limit}\n")
    return zone


def test_the_energy_of_all_processors_is_summed_across_their_counters_wrapping(tmp_path):
    one, two = _zone(tmp_path, "intel-rapl:0", 900), _zone(tmp_path, "intel-rapl:1", 0)
    _zone(tmp_path, "intel-rapl:0:0", 500)  # a part of the first, counted there
    meter = RaplMeter(tmp_path)
    assert meter.joules() == 0
    (one / "energy_uj").write_text("99")  # 900 .. 1000, then 0 .. 99
    (two / "energy_uj").write_text("50")
    assert meter.joules() == pytest.approx(250e-6)
    (one / "energy_uj").write_text("100")
    assert meter.joules() == pytest.approx(251e-6)


def test_a_machine_without_readable_counters_says_so(tmp_path):
    assert RaplMeter(tmp_path).joules() is None
    zone = _zone(tmp_path, "intel-rapl:0", 1)
    meter = RaplMeter(tmp_path)
    (zone / "energy_uj").unlink()
    assert meter.joules() is None
