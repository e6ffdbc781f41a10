"""`meshwall service`: what the API says of services, as tables."""

from clustermesh.services import Port, Service, ServiceExport
from daemon.api.services import exports_json, service_json
from daemon.cli.service import export_lines, one_lines, service_lines
from daemon.state.services import all_merged
from daemon.state.tables import LOCAL, ServiceKey, ServiceRow, Tables


def service(cluster: str, number: int, *backends: str) -> Service:
    ports = {one: {"http": Port("TCP", 8080)} for one in backends}
    frontends = {"10.97.0.10": {"http": Port("TCP", 80)}}
    return Service(cluster, "prod", "web", frontends, ports, shared=True, cluster_id=number)


def tables() -> Tables:
    made = Tables()
    sick = {"10.0.0.5": "Connection refused"}
    ours = ServiceRow(service("east", 1, "10.0.0.5"), affinity="local", unhealthy=sick)
    made.services.put(ServiceKey("prod", "web", LOCAL), ours)
    made.services.put(ServiceKey("prod", "web", "mesh:west"), ServiceRow(service("west", 2, "10.1.0.5")))
    return made


def test_the_list_counts_backends_by_cluster() -> None:
    [found] = map(service_json, all_merged(tables().services.rows, "east"))
    [_, line] = service_lines({"services": [found]})
    assert " ".join(line.split()) == "prod web yes local 10.97.0.10 http:80/TCP east 0/1, west 1/1"


def test_one_service_says_why_each_backend_is_chosen_or_not() -> None:
    [found] = map(service_json, all_merged(tables().services.rows, "east"))
    assert one_lines(found)[-2:] == [
        "10.0.0.5  http:8080/TCP  east     no      unhealthy: Connection refused",
        "10.1.0.5  http:8080/TCP  west     yes     affinity local, but nothing preferred is healthy",
    ]
    assert found["text"] == "1 of 2 backends, 1 of them in other clusters"


def test_exports_say_which_one_counts() -> None:
    made = tables()
    for cluster, month in (("west", 1), ("north", 2)):
        export = ServiceExport(
            cluster, "web", "prod", f"2026-0{month}-01T00:00:00Z", (), "ClusterSetIP", "None"
        )
        made.exports.put(ServiceKey("prod", "web", f"mesh:{cluster}"), export)
    lines = export_lines({"exports": exports_json(made)})
    assert [(line.split()[2], line.partition("-      ")[2]) for line in lines[1:]] == [
        ("north", "no: another is older"),
        ("west", "yes"),
    ]
