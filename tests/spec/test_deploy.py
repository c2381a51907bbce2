"""The deployment file: what it may say, what is derived, and one clear error for everything else."""

from typing import Any

import pytest

from brigade.engine.config import EngineConfig
from brigade.spec.deploy import (
    BOUNDS,
    KEYS,
    LIMIT_KEYS,
    UNIT_KEYS,
    BadDeployment,
    ChangeRoles,
    Deployment,
    Limits,
    Units,
    deployment_from,
    plain,
    shown,
    unit_names,
)
from brigade.spec.layout import Host


def unit(**more: Any) -> dict[str, Any]:
    return {"role": "mixed", **more}


def error_of(data: object, line_of: dict[Any, int] | None = None) -> str:
    with pytest.raises(BadDeployment) as caught:
        deployment_from(data, "d.yaml", line_of)
    return str(caught.value)


def test_the_set_of_keys_is_small_and_known() -> None:
    top = (
        "model weights drafts wire rank_memory listen api_key_file admin_listen admin_key_file gateway host_port "
        "secret_file link units limits change_roles"
    )
    assert " ".join(KEYS) == top
    assert " ".join(UNIT_KEYS) == "role name count hosts ranks_per_host redundant_experts limits"
    assert " ".join(LIMIT_KEYS) == "max_running max_waiting max_context max_step_tokens kv_memory kv_disk rank_deadline"


def test_an_empty_mapping_is_one_rank_of_the_demo_model_here() -> None:
    assert deployment_from({}) == Deployment()
    assert deployment_from({}).units[0].layouts()[0].n_ranks == 1


def test_everything_that_can_be_said() -> None:
    d = deployment_from(
        {
            "model": "/models/v3",
            "weights": "int8",
            "rank_memory": "80GB",
            "listen": "[::1]:9000",
            "api_key_file": "keys/clients",
            "gateway": "gate",
            "host_port": 7001,
            "secret_file": "keys/hosts",
            "link": "nixl",
            "limits": {"max_running": 8, "kv_memory": "1GiB"},
            "units": [
                unit(role="prefill", count=2, hosts=["a", "b", "c", "d"], ranks_per_host=8, redundant_experts=32),
                unit(role="decode", hosts=["10.0.0.1", "fe80::1"], limits={"max_running": 128}),
            ],
        }
    )
    assert (d.model, d.weights, d.rank_memory, d.listen) == ("/models/v3", "int8", 80 * 10**9, ("::1", 9000))
    assert d.other_hosts == ("a", "b", "c", "d", "10.0.0.1", "fe80::1"), "the gateway has no ranks"
    prefill, decode = d.units
    assert [[h.address for h in x.hosts] for x in prefill.layouts()] == [["a", "b"], ["c", "d"]]
    assert prefill.layouts()[0].n_ranks == 16
    assert d.limits_of(prefill) == Limits(max_running=8, kv_memory=1 << 30)
    assert d.limits_of(decode) == Limits(max_running=128, kv_memory=1 << 30)


def test_the_gateway_is_the_first_host_unless_it_is_named() -> None:
    units = [unit(role="prefill", hosts=["a", "b"]), unit(role="decode", hosts=["b", "c"])]
    d = deployment_from({"secret_file": "s", "units": units})
    assert (d.head, d.hosts, d.other_hosts) == ("a", ("a", "b", "c"), ("b", "c"))
    d = deployment_from({"secret_file": "s", "gateway": "c", "units": units})
    assert (d.head, d.other_hosts) == ("c", ("a", "b"))
    assert plain(d)["gateway"] == "c"


def test_units_may_share_one_host() -> None:
    d = deployment_from({"units": [unit(role="prefill", count=2), unit(role="decode", hosts=["127.0.0.1"])]})
    assert [x.hosts for u in d.units for x in u.layouts()] == [(Host("127.0.0.1", 1),)] * 3


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "d.yaml: the file must be keys with values, like 'model: /models/mine', not a list"),
        ({"modle": "x"}, "d.yaml: modle: unknown key; did you mean 'model'?"),
        (
            {"units": [{"role": "mixed", "ranks-per-host": 2}]},
            "d.yaml: units[0].ranks-per-host: unknown key; did you mean 'ranks_per_host'?",
        ),
        ({"zzz": 1}, "d.yaml: zzz: unknown key; known here: model, weights"),
        ({1: 2}, "d.yaml: 1: unknown key; known here"),
        ({"api_key": "hunter2hunter2"}, "keys never stand in this file; write the key into a file"),
        ({"secret": "hunter2hunter2"}, "secrets never stand in this file"),
        ({"model": None}, "d.yaml: model: has no value; give it one, or leave the key out"),
        ({"model": 7}, "d.yaml: model: must be text, not 7"),
        ({"model": " "}, "d.yaml: model: must be text"),
        ({"model": "a\0b"}, "d.yaml: model: must not hold a NUL"),
        ({"model": "a\ud800"}, "d.yaml: model: must not hold half a character"),
        ({"weights": "int9"}, "d.yaml: weights: must be auto, bf16, int8 or int4, not 'int9'; did you mean int8?"),
        ({"units": [{}]}, "d.yaml: units[0]: 'role' is missing; add it"),
        ({"link": "nixel"}, "link: must be shared, tcp or nixl, not 'nixel'; did you mean nixl?"),
        ({"link": "tcp"}, "link: prompts go from one unit to another, and there is one; leave it out"),
        ({"units": [unit(role="decod")]}, "units[0].role: must be mixed, prefill or decode, not 'decod'; did you mean"),
        ({"units": {}}, "d.yaml: units: must be a list (lines that begin with '- '), not keys with values"),
        ({"units": []}, "d.yaml: units: is empty"),
        ({"units": [unit(hosts=[])]}, "d.yaml: units[0].hosts: is empty"),
        ({"units": [unit(hosts=["a", "a"])]}, "units[0].hosts[1]: a is there twice"),
        ({"units": [unit(hosts=["a", 7])]}, "units[0].hosts[1]: must be a host name or an IP address, not 7"),
        ({"units": [unit(hosts=["a:80"])]}, "units[0].hosts[0]: must be a host name or an IP address without a port"),
        ({"units": [unit(hosts=["10.0.0.256"])]}, "units[0].hosts[0]: must be a host name or an IP address"),
        ({"units": [unit(hosts=["0.0.0.0"])]}, "units[0].hosts[0]: 0.0.0.0 is every address of a machine"),
        (
            {"units": [unit(hosts=["a", "127.0.0.1"])]},
            "units[0].hosts: 127.0.0.1 is this machine only, and a cannot reach it",
        ),
        ({"units": [unit(hosts=["a", "b", "c"], count=2)]}, "3 hosts cannot be shared equally by 2 units"),
        (
            {"secret_file": "s", "units": [unit(role="prefill", hosts=["a"]), unit(role="decode")]},
            "units[1]: 127.0.0.1 is this machine only, and a cannot reach it; give all hosts addresses",
        ),
        (
            {"gateway": "127.0.0.1", "secret_file": "s", "units": [unit(hosts=["a"])]},
            "units[0].hosts: 127.0.0.1 is this machine only, and a cannot reach it",
        ),
        ({"gateway": "g", "units": [unit(hosts=["a"])]}, "units[0].hosts: hosts know each other by a secret"),
        ({"gateway": "0.0.0.0"}, "gateway: 0.0.0.0 is every address of a machine"),
        ({"units": [unit(hosts=["a", "b"])]}, "units[0].hosts: hosts know each other by a secret"),
        ({"units": [unit(count=True)]}, "units[0].count: must be a whole number from 1 to 1024, not true"),
        ({"units": [unit(count=1e3)]}, "units[0].count: must be a whole number from 1 to 1024, not 1000.0"),
        ({"units": [unit(ranks_per_host=65)]}, "units[0].ranks_per_host: must be from 1 to 64, not 65"),
        ({"limits": {"max_runing": 1}}, "limits.max_runing: unknown key; did you mean 'max_running'?"),
        ({"limits": {"max_context": -1}}, "limits.max_context: must be from 1 to 16777216, not -1"),
        (
            {"limits": {"kv_disk": "/mnt"}},
            "limits.kv_disk: '/mnt' must be a folder, from / on, and a size, like /mnt/n",
        ),
        ({"limits": {"kv_disk": 7}}, "limits.kv_disk: must be text, not 7"),
        ({"limits": {"kv_memory": "2G"}}, "limits.kv_memory: '2G' is ambiguous; write 2GiB (1024) or 2GB (1000)"),
        (
            {"limits": {"kv_memory": "9" * 5000}},
            "kv_memory: must be a size like 512MiB or 80GB, not a long text",
        ),
        ({"limits": {"kv_memory": 0}}, "limits.kv_memory: must be from 1024 to"),
        ({"rank_memory": "9999PB"}, "rank_memory: must be from 1048576 to"),
        ({"listen": "0.0.0.0:80"}, "listen: 0.0.0.0 can be reached by other machines, so clients need a key"),
        ({"listen": "127.0.0.1"}, "listen: must be an address and a port, not '127.0.0.1'; write it like"),
        ({"listen": "::1:80"}, "listen: must be an address and a port"),
        ({"listen": "a:99999"}, "listen: port must be from 0 to 65535, not 99999"),
        ({"listen": 8000}, "listen: must be an address and a port, not 8000"),
        ({"host_port": 0}, "host_port: must be from 1 to 65535, not 0"),
    ],
)
def test_what_cannot_be_is_one_error_with_its_place(data: object, message: str) -> None:
    assert message in error_of(data)


def test_an_error_names_the_line_of_the_key_or_of_what_it_is_in() -> None:
    lines = {(): 1, ("units",): 3, ("units", 0): 4, ("units", 0, "hosts", 1): 9}
    assert error_of({"units": [unit(hosts=["a", "a"])]}, lines).startswith("d.yaml:9: units[0].hosts[1]: ")
    assert error_of({"units": [unit(count=0)]}, lines).startswith("d.yaml:4: units[0].count: ")
    assert error_of([], lines).startswith("d.yaml:1: ")


def test_a_key_that_was_written_into_the_file_is_not_repeated() -> None:
    assert "hunter2" not in error_of({"api_key": "hunter2hunter2"})


def test_bounds_are_those_of_the_engine() -> None:
    for name in ("max_running", "max_waiting", "max_context", "max_step_tokens"):
        low, high = BOUNDS[name]
        enough = {} if name == "max_step_tokens" else {"max_step_tokens": 1 << 20}
        few = {"max_running": 1} if name == "max_step_tokens" else {}
        for value in (low, high):
            EngineConfig(**{**enough, **few, name: value})
        with pytest.raises(ValueError, match=name):
            EngineConfig(**{**enough, **few, name: high + 1})


def test_what_is_written_back_reads_as_the_same() -> None:
    data = {
        "listen": "[::1]:9000",
        "limits": {"kv_memory": 1 << 20},
        "units": [unit(hosts=["a", "b"], ranks_per_host=1), {"role": "decode", "count": 3, "hosts": ["a"]}],
        "secret_file": "s",
    }
    d = deployment_from(data)
    assert plain(d) == data | {"units": [data["units"][0], data["units"][1]]}
    assert deployment_from(plain(d)) == d
    assert plain(Deployment(units=(Units("mixed", ranks_per_host=2),))) == {
        "units": [{"role": "mixed", "ranks_per_host": 2}]
    }


def test_a_path_is_shown_as_people_write_it() -> None:
    assert shown(("units", 0, "hosts", 1)) == "units[0].hosts[1]"


# Orders to units -----------------------------------------------------------------------------------------------------


def test_orders_to_units_are_taken_on_loopback_where_there_is_a_key_for_them() -> None:
    assert deployment_from({}).admin_key_file is None
    d = deployment_from({"admin_key_file": "keys/admin"})
    assert (d.admin_key_file, d.admin_listen) == ("keys/admin", ("127.0.0.1", 8001))
    given = {"admin_key_file": "keys/admin", "admin_listen": "10.0.0.1:9001"}
    assert deployment_from(given).admin_listen == ("10.0.0.1", 9001)
    assert plain(deployment_from(given)) == given


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        ({"admin_listen": "127.0.0.1:9001"}, "admin_listen: orders to units are taken only with a key"),
        ({"admin_key_file": "k", "admin_listen": "127.0.0.1:8000"}, "admin_listen: port 8000 is that of 'listen'"),
        ({"admin_key": "k"}, "admin_key: keys never stand in this file"),
    ],
)
def test_an_admin_address_without_a_key_or_a_port_of_its_own_is_refused(data: dict[str, Any], problem: str) -> None:
    assert problem in error_of(data)


TWO_HOSTS = {"secret_file": "s", "units": [{"role": "mixed", "hosts": ["10.0.0.1", "10.0.0.2"]}]}


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        ({"listen": "10.0.0.1:7000", "api_key_file": "k"}, "listen: port 7000 is that of 'host_port'"),
        ({"listen": "0.0.0.0:80", "api_key_file": "k", "host_port": 80}, "host_port: port 80 is that of 'listen'"),
        (
            {"admin_key_file": "k", "admin_listen": "10.0.0.1:7000"},
            "admin_listen: port 7000 is that of 'host_port'; give another one",
        ),
    ],
)
def test_hosts_have_a_port_of_their_own(data: dict[str, Any], problem: str) -> None:
    assert problem in error_of(TWO_HOSTS | data)
    assert deployment_from({**data, "host_port": 7001} | TWO_HOSTS).host_port == 7001


def test_one_port_at_two_addresses_is_two_ports_and_no_host_calls_where_there_is_none() -> None:
    assert deployment_from(TWO_HOSTS | {"listen": "127.0.0.1:7000"}).listen[1] == 7000
    assert deployment_from({"listen": "127.0.0.1:7000"}).listen[1] == 7000


# Roles that change ---------------------------------------------------------------------------------------------------


def test_units_change_their_roles_by_themselves_only_where_the_file_says_so() -> None:
    assert deployment_from({}).change_roles is None
    assert deployment_from({"change_roles": {}}).change_roles == ChangeRoles(2.0, 0.5)
    given = {"change_roles": {"prefill_seconds": 4.0}}
    assert deployment_from(given).change_roles == ChangeRoles(4.0, 0.5)
    assert plain(deployment_from(given)) == given


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ({"prefill": 2}, "change_roles.prefill: unknown key; did you mean 'prefill_seconds'?"),
        ({"decode_seconds": 0}, "change_roles.decode_seconds: must be seconds from 0.01 to 3600, not 0"),
        ({"decode_seconds": True}, "change_roles.decode_seconds: must be seconds"),
        ("yes", "change_roles: it must be keys with values"),
    ],
)
def test_targets_that_cannot_be_are_refused(value: object, problem: str) -> None:
    assert problem in error_of({"change_roles": value})


# Names of units -------------------------------------------------------------------------------------------------------


def test_units_are_called_by_their_role_and_a_number_or_as_the_file_says() -> None:
    d = deployment_from(
        {"units": [unit(role="prefill"), unit(role="decode", count=2), unit(name="box"), unit(role="decode"), unit()]}
    )
    assert unit_names(d) == ("prefill-0", "decode-0", "decode-1", "box", "decode-2", "mixed-0")
    assert unit_names(deployment_from({"units": [unit(name="rack", count=3)]})) == ("rack-0", "rack-1", "rack-2")
    assert unit_names(deployment_from({})) == ("mixed-0",)


@pytest.mark.parametrize(
    ("units", "problem"),
    [
        ([unit(name="a"), unit(name="a")], "d.yaml: units[0].name: another unit is called a, too"),
        ([unit(), unit(name="mixed-0")], "d.yaml: units[1].name: another unit is called mixed-0, too"),
        ([unit(name="Rack 1")], "d.yaml: units[0].name: must be lower-case letters, digits and single hyphens"),
        ([unit(name="x" * 41)], "d.yaml: units[0].name: must be lower-case letters, digits and single hyphens"),
    ],
)
def test_a_name_is_that_of_one_unit_and_easy_to_type(units: list[dict[str, Any]], problem: str) -> None:
    assert error_of({"units": units}).startswith(problem)
