import sys
import types

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bise.store.energy import MachineMeter, NvmlMeter, RaplMeter, Shares


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


class _Nvml(types.ModuleType):
    """NVIDIA's library with cards that count what a test says, in millijoules; None: a card that cannot."""

    class NVMLError(Exception):
        pass

    def __init__(self, *counts):
        super().__init__("fake_nvml")
        self.counts = list(counts)

    def nvmlInit(self):
        if not self.counts:
            raise self.NVMLError("Driver Not Loaded")

    def nvmlDeviceGetCount(self):
        return len(self.counts)

    def nvmlDeviceGetHandleByIndex(self, index):
        return index

    def nvmlDeviceGetTotalEnergyConsumption(self, card):
        if self.counts[card] is None:
            raise self.NVMLError("Not Supported")
        return self.counts[card]


@pytest.fixture
def nvml(monkeypatch):
    def make(*counts):
        library = _Nvml(*counts)
        monkeypatch.setitem(sys.modules, "fake_nvml", library)
        return library

    return make


def test_the_energy_of_all_cards_that_count_it_is_summed(nvml):
    library = nvml(5000, None, 7000)
    meter = NvmlMeter("fake_nvml")
    assert meter.joules() == 0
    library.counts = [6000, None, 7500]
    assert meter.joules() == pytest.approx(1.5)
    library.counts[0] = None
    assert meter.joules() is None


def test_without_the_library_a_driver_or_a_card_there_is_no_energy(nvml):
    assert NvmlMeter("no_such_library").joules() is None
    nvml()
    assert NvmlMeter("fake_nvml").joules() is None
    nvml(None)
    assert NvmlMeter("fake_nvml").joules() is None


def test_a_machine_adds_up_what_can_be_read_and_names_it(tmp_path, nvml):
    zone, library = _zone(tmp_path, "intel-rapl:0", 0, 10**9), nvml(1000)
    meter = MachineMeter({"rapl": RaplMeter(tmp_path), "nvml": NvmlMeter("fake_nvml")})
    assert meter.sources == ("rapl", "nvml")
    (zone / "energy_uj").write_text("2000000")
    library.counts = [4000]
    assert meter.joules() == pytest.approx(5.0)
    alone = MachineMeter({"rapl": RaplMeter(tmp_path), "nvml": NvmlMeter("no_such_library")})
    assert alone.sources == ("rapl",)
    nothing = MachineMeter({"nvml": NvmlMeter("no_such_library")})
    assert (nothing.sources, nothing.joules()) == ((), None)


_EVENTS = st.lists(
    st.tuples(st.integers(0, 5), st.floats(0, 10), st.one_of(st.none(), st.floats(0, 100))), max_size=40
)


@given(_EVENTS)
def test_whoever_runs_gets_an_equal_part_of_every_moment(events):
    now, counted, is_known = 0.0, 0.0, True
    shares = Shares(lambda: counted if is_known else None, lambda: now)
    running, was_known = {}, True
    for name, seconds, joules in events:
        now += seconds
        is_known = joules is not None
        counted += joules or 0.0
        for had in running.values():
            had[0] += seconds / len(running)
            had[1] += (joules or 0.0) / len(running)
            had[2] = had[2] and was_known and is_known
        was_known = is_known
        if str(name) not in running:
            shares.enter(str(name))
            running[str(name)] = [0.0, 0.0, True]
            continue
        machine_s, energy_j = shares.leave(str(name))
        expected_s, expected_j, had_counter = running.pop(str(name))
        assert machine_s == pytest.approx(expected_s)
        assert energy_j == (pytest.approx(expected_j) if had_counter else None)
