"""Network models: links, what messages share, regions from a table, and models that make no sense."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path

import pytest

import flowml as fm

YARDSTICKS = Path(os.environ.get("FLOWML_YARDSTICKS", Path(__file__).resolve().parents[3] / "shared" / "yardsticks"))

TABLE = """\
a,b,round_trip_or_delay_ms,gbit_per_s
North,South,80,0.8
North,East,20,1.6
South,East,100,0.4
"""


def regions() -> fm.sim.Regions:
    return fm.sim.Regions.parse(TABLE, "table.csv")


def test_a_link_takes_its_latency_and_its_bytes() -> None:
    network = fm.sim.Network(latency_s=1e-3, bytes_per_s=1e6)
    assert network.link(0, 1) == (1e-3, 1e6)
    assert network.link(0, fm.sim.DRIVER).seconds(5000) == pytest.approx(6e-3)
    assert network.link(3, 3).seconds(1e9) == 0
    assert network.shared(0, 1) == ()
    network.check(10_000)


def test_senders_share_an_uplink_and_a_receiver_has_one_downlink() -> None:
    network = fm.sim.Network(1e-3, 1e6, uplink_bytes_per_s=2e6, downlink_bytes_per_s=3e6)
    assert network.shared(0, 1) == ((("up", 0), 2e6), (("down", 1), 3e6))
    assert set(network.shared(0, 1)) & set(network.shared(0, 2)) == {(("up", 0), 2e6)}
    assert set(network.shared(0, 2)) & set(network.shared(1, 2)) == {(("down", 2), 3e6)}
    assert network.shared(1, 1) == ()


def test_a_table_holds_in_both_directions_and_a_round_trip_is_two_ways() -> None:
    table = regions()
    assert table.names == ("North", "South", "East")
    assert table.link("South", "North") == table.link("North", "South") == pytest.approx((0.04, 1e8))
    one_way = fm.sim.Regions.parse(TABLE, delay="one way").link("North", "South")
    assert one_way == pytest.approx((0.08, 1e8))
    assert table.link("North", "North") is None
    uneven = fm.sim.Regions({("a", "b"): (1, 10), ("b", "a"): (2, 20)})
    assert (uneven.link("a", "b"), uneven.link("b", "a")) == ((1, 10), (2, 20))


def test_sites_have_local_links_inside_and_the_table_between() -> None:
    sites = fm.sim.Sites(regions(), ["North", "North", "East"], local=fm.sim.Network(1e-4, 1e9))
    assert sites == fm.sim.Sites(regions(), ["North", "North", "East"], local=fm.sim.Network(1e-4, 1e9))
    assert sites.link(0, 1) == (1e-4, 1e9)
    assert sites.link(0, 2) == sites.link(2, 1) == pytest.approx((0.01, 2e8))
    assert sites.site(fm.sim.DRIVER) == "North"
    assert sites.link(2, fm.sim.DRIVER) == sites.link(2, 0)
    assert fm.sim.Sites({("a", "b"): (0.1, 5e6)}, {"a": 2, "b": 1}, driver="b").link(fm.sim.DRIVER, 2) == (1e-4, 1.25e9)
    sites.check(3)
    with pytest.raises(fm.SimulationError, match="members has 3 workers and the cluster has 4"):
        sites.check(4)


def test_messages_between_sites_share_what_is_asked_for() -> None:
    members = {"North": 2, "South": 2}
    assert fm.sim.Sites(regions(), members).shared(0, 2) == ()
    sites = fm.sim.Sites(regions(), members, uplink_bytes_per_s=5e7, shared_lines=True)
    between = ((("up", "North"), 5e7), (("line", "North", "South"), 1e8))
    assert sites.shared(0, 2) == sites.shared(1, 3) == between
    assert sites.shared(0, 1) == ()
    assert set(sites.shared(0, 2)) & set(sites.shared(2, 0)) == set()
    own = fm.sim.Sites(regions(), members, local=fm.sim.Network(0, 1e9, uplink_bytes_per_s=7e8), shared_lines=True)
    assert own.shared(0, 2) == ((("up", 0), 7e8), between[1])


NONSENSE: dict[str, tuple[Callable[[], object], str]] = {
    "latency": (lambda: fm.sim.Network(-1, 1), "Network: latency_s=-1 makes no sense"),
    "nan": (lambda: fm.sim.Network(0, math.nan), "bytes_per_s=nan"),
    "rate": (lambda: fm.sim.Network(0, 0), "bytes_per_s=0 makes no sense; give a finite number above 0"),
    "uplink": (lambda: fm.sim.Network(0, 1, uplink_bytes_per_s=0), "uplink_bytes_per_s=0"),
    "downlink": (lambda: fm.sim.Network(0, 1, downlink_bytes_per_s=-2), "downlink_bytes_per_s=-2"),
    "pair": (lambda: fm.sim.Regions({("a", "b"): (-1, 1)}), r"Regions\['a', 'b'\]: latency_s=-1"),
    "unknown": (lambda: fm.sim.Sites(regions(), ["North", "West"]), "no region 'West'|no region West"),
    "unknown driver": (lambda: fm.sim.Sites(regions(), ["North"], driver="West"), "it has North, South, East"),
    "unlinked": (
        lambda: fm.sim.Sites({("a", "b"): (0, 1), ("b", "c"): (0, 1)}, ["a", "c"]),
        "the table has no link from a to c; add it, or leave one of the two out of members",
    ),
    "nobody": (lambda: fm.sim.Sites(regions(), []), "members is empty"),
    "number": (lambda: fm.sim.Sites(regions(), [1]), "members has 1, which is not the name"),  # type: ignore[list-item]
    "count": (lambda: fm.sim.Sites(regions(), {"North": -1}), r"members\['North'\]=-1"),
    "text": (lambda: fm.sim.Sites(regions(), "North"), "members is neither"),
    "table": (lambda: fm.sim.Sites(3, ["a"]), "table=int is not a Regions"),  # type: ignore[arg-type]
    "site uplink": (lambda: fm.sim.Sites(regions(), ["North"], uplink_bytes_per_s=0), "uplink_bytes_per_s=0"),
    "delay": (lambda: fm.sim.Regions.parse(TABLE, delay="half"), "delay='half'"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("name", NONSENSE)
def test_a_network_that_makes_no_sense_says_why_in_one_line(name: str) -> None:
    make, text = NONSENSE[name]
    with pytest.raises(fm.SimulationError, match=text) as caught:
        make()
    assert "\n" not in str(caught.value)


DAMAGED = {
    "no column": ("a,b,gbit_per_s\nx,y,1\n", "t.csv, line 1: column 'round_trip_or_delay_ms' is missing"),
    "empty": ("", "t.csv, line 1: column 'a' is missing; the columns there are none"),
    "header alone": (TABLE.splitlines()[0] + "\n", "t.csv, line 2: there is no row after the header"),
    "cut short": (TABLE[: TABLE.rindex(",")], "t.csv, line 4: column 'gbit_per_s' is missing; the line is cut short"),
    "too many": (TABLE + "East,West,1,2,3\n", "t.csv, line 5: 5 fields in 4 columns"),
    "no number": (
        TABLE + "East,West,fast,2\n",
        "t.csv, line 5, column 'round_trip_or_delay_ms': 'fast' is not a number",
    ),
    "negative": (TABLE + "East,West,-1,2\n", "line 5, column 'round_trip_or_delay_ms': '-1' is not a finite number"),
    "zero": (TABLE + "East,West,1,0\n", "line 5, column 'gbit_per_s': '0' is not a finite number above 0"),
    "no name": (TABLE + "East,,1,2\n", "line 5, column 'b': '' is not a name"),
    "twice": (TABLE + "North,South,1,2\n", "line 5, column 'b': the link of North and South is there twice"),
    "binary": (TABLE + '"\x00\n', "t.csv, line 5"),
}


def test_a_table_whose_last_line_does_not_end_may_be_cut_within_a_number() -> None:
    with pytest.warns(fm.FlowmlWarning, match=r"t\.csv: the last line does not end, so its number may be cut short"):
        fm.sim.Regions.parse(TABLE.rstrip("\n"), "t.csv")


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_table_names_the_line_and_column(name: str) -> None:
    text, expected = DAMAGED[name]
    with pytest.raises(fm.TraceError) as caught:
        fm.sim.Regions.parse(text, "t.csv")
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(not (YARDSTICKS / "wan_regions.csv").exists(), reason="the measured table of regions is not here")
def test_the_measured_table_of_ten_regions_loads() -> None:
    """Yuan et al., Decentralized training of foundation models, NeurIPS 2022: Oregon to Virginia 67 ms, 0.79 Gbit/s."""
    table = fm.sim.Regions.read(YARDSTICKS / "wan_regions.csv")
    assert len(table.names) == 10
    assert table.link("Virginia", "Oregon") == pytest.approx((0.0335, 0.79e9 / 8))
    sites = fm.sim.Sites(YARDSTICKS / "wan_regions.csv", dict.fromkeys(table.names, 2))
    assert sites.link(0, 19) == table.link("Oregon", "Ireland")
