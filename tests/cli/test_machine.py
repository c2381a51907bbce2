"""What is said of the machine beside a measurement, and whether a port is free."""

import socket

from brigade.cli.machine import describe, port_problem


def test_a_port_in_use_is_told_from_a_free_one() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert "in use" in str(port_problem("127.0.0.1", port))
    assert port_problem("127.0.0.1", port) is None


def test_a_measurement_can_say_where_it_was_made() -> None:
    machine = describe()
    assert machine["cpu"]
    assert machine["cores"] >= 1
    assert len(machine["load_average"]) == 3
