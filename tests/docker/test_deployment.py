"""The files in docker/ agree with the code and with each other."""

import base64
import hashlib
import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import yaml

from worker import __version__
from worker.settings import Settings

DOCKER = Path(__file__).parents[2] / "docker"
KUBERNETES = DOCKER / "kubernetes"
SETTINGS = {name.upper() for name in Settings.model_fields}
SECRETS = {"AMQP_URL_FILE", "ONENET_API_KEY_FILE", "ONENET_ACCESS_KEY_FILE", "IDEMPOTENCY_URL_FILE"}
PORT = Settings.model_fields["http_port"].default
GRACE_S = Settings.model_fields["worker_shutdown_grace"].default
COMPOSE: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
MANIFESTS: dict[str, dict[str, Any]] = {
    found["kind"]: found for path in KUBERNETES.glob("*.yaml") for found in yaml.safe_load_all(path.read_text())
}
POD = MANIFESTS["Deployment"]["spec"]["template"]
(CONTAINER,) = POD["spec"]["containers"]
ANTI_AFFINITY = POD["spec"]["affinity"]["podAntiAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"]
PERFORMANCE = json.loads((DOCKER.parent / "docs" / "performance.json").read_text())["medians"]
HELD_MIB = 64  # most that large messages and histories take in addition


def test_the_image_exposes_the_default_port() -> None:
    stage = (DOCKER / "Dockerfile").read_text().rpartition("\nFROM ")[2]  # the last one is built by default
    assert re.findall(r"^EXPOSE (\d+)$", stage, re.MULTILINE) == [str(PORT)]


def test_the_worker_gets_existing_settings_only() -> None:
    in_compose = set(SERVICES["worker"]["environment"])
    in_kubernetes = {variable["name"] for variable in CONTAINER["env"]}
    assert in_compose | in_kubernetes <= SETTINGS | SECRETS


@pytest.mark.parametrize("name", SERVICES)
def test_services_have_no_privileges_and_read_only_file_systems(name: str) -> None:
    service = SERVICES[name]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert "privileged" not in service
    assert service.get("read_only") or name in {"rabbitmq", "grafana"}  # whose images are not known to do without


def test_published_ports_are_on_loopback_and_configurable() -> None:
    ports = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert ports
    assert all(re.fullmatch(r"127\.0\.0\.1:\$\{[A-Z]+_PORT:-\d+\}:\d+", port) for port in ports)


def test_kubernetes_runs_the_image_of_this_version() -> None:
    [image] = yaml.safe_load((KUBERNETES / "kustomization.yaml").read_text())["images"]
    assert (image["name"], image["newTag"]) == (CONTAINER["image"], __version__)


def test_compose_can_scale_the_workers() -> None:
    assert not {"container_name", "ports", "hostname"} & set(SERVICES["worker"])
    assert SERVICES["worker"]["environment"]["IDEMPOTENCY_URL"].startswith("redis://")


def test_containers_have_more_time_to_stop_than_the_shutdown_grace() -> None:
    grace_s = SERVICES["worker"]["stop_grace_period"]
    assert int(grace_s.removesuffix("s")) > GRACE_S
    assert POD["spec"]["terminationGracePeriodSeconds"] > GRACE_S


def test_dependencies_of_the_worker_are_healthy_before_it_starts() -> None:
    for needed, how in SERVICES["worker"]["depends_on"].items():
        is_one_shot = SERVICES[needed]["restart"] == "no"
        assert how == {"condition": "service_completed_successfully" if is_one_shot else "service_healthy"}
        assert is_one_shot or "test" in SERVICES[needed]["healthcheck"]


def test_redis_persists_its_data_and_evicts_nothing() -> None:
    assert "--appendonly yes" in SERVICES["redis"]["command"]
    assert "--maxmemory-policy noeviction" in SERVICES["redis"]["command"]


def test_the_definitions_hold_only_the_hashes_of_the_passwords() -> None:
    access = runpy.run_path(str(DOCKER / "rabbitmq" / "make_definitions.py"))["access"]
    passwords = {"worker": "a password", "upstream": "another one"}
    topology = Settings.model_construct().topology
    made = access(passwords, topology, may_declare=True)
    assert [user["name"] for user in made["users"]] == list(passwords)
    for user in made["users"]:
        found = base64.b64decode(user["password_hash"])
        assert found[4:] == hashlib.sha256(found[:4] + passwords[user["name"]].encode()).digest()
        assert passwords[user["name"]] not in json.dumps(made)
    assert made["users"] != access(passwords, topology, may_declare=True)["users"]  # salted


def test_images_of_others_are_pinned_by_digest() -> None:
    dockerfile = (DOCKER / "Dockerfile").read_text()
    stages = re.findall(r"^FROM (\S+) AS (\S+)$", dockerfile, re.MULTILINE)
    [base] = re.findall(r"^ARG PYTHON_IMAGE=(\S+)$", dockerfile, re.MULTILINE)
    assert {base for base, _ in stages} - {name for _, name in stages} == {"${PYTHON_IMAGE}"}
    images = {re.sub(r"^\$\{[A-Z]+_IMAGE:-(.*)\}", r"\1", service["image"]) for service in SERVICES.values()}
    ours = {"onenet-execute-worker", "onenet-execute-worker-simulator"}
    assert ours < images
    for image in images - ours | {base}:
        assert re.fullmatch(r"[a-z/]+:[\w.-]+@sha256:[0-9a-f]{64}", image), image


def test_the_image_for_production_installs_what_the_lock_file_of_all_extras_has() -> None:
    def locked(name: str) -> set[str]:
        text = (DOCKER.parent / "requirements" / f"{name}.lock").read_text().replace("\\\n", "")
        return set(text.splitlines())

    assert locked("production") < locked("runtime")


def test_kustomize_includes_every_manifest() -> None:
    files = {path.name for path in KUBERNETES.iterdir()} - {"kustomization.yaml"}
    assert set(MANIFESTS["Kustomization"]["resources"]) == files


def test_manifests_refer_to_each_other_by_existing_names() -> None:
    labels = POD["metadata"]["labels"].items()
    selectors = [
        MANIFESTS["Deployment"]["spec"]["selector"],
        MANIFESTS["PodDisruptionBudget"]["spec"]["selector"],
        MANIFESTS["NetworkPolicy"]["spec"]["podSelector"],
        *(constraint["labelSelector"] for constraint in POD["spec"]["topologySpreadConstraints"]),
        *(preferred["podAffinityTerm"]["labelSelector"] for preferred in ANTI_AFFINITY),
    ]
    assert all(selector["matchLabels"].items() <= labels for selector in selectors)
    scaled = MANIFESTS["ScaledObject"]["spec"]
    assert scaled["scaleTargetRef"]["name"] == MANIFESTS["Deployment"]["metadata"]["name"]
    (trigger,) = scaled["triggers"]
    assert trigger["authenticationRef"]["name"] == MANIFESTS["TriggerAuthentication"]["metadata"]["name"]
    assert trigger["metadata"]["queueName"] == f"{Settings.model_fields['worker_namespace'].default}.execute"
    assert POD["spec"]["serviceAccountName"] == MANIFESTS["ServiceAccount"]["metadata"]["name"]
    generated = {one["name"] for one in MANIFESTS["Kustomization"]["configMapGenerator"]}
    assert {one["configMapRef"]["name"] for one in CONTAINER["envFrom"]} == generated


def test_all_secrets_come_from_one_secret() -> None:
    (volume,) = POD["spec"]["volumes"]
    (mount,) = CONTAINER["volumeMounts"]
    secret = volume["secret"]["secretName"]
    keys = set(re.findall(r"--from-literal=([a-z-]+)=", (KUBERNETES / "kustomization.yaml").read_text()))
    assert {variable["value"] for variable in CONTAINER["env"]} == {f"{mount['mountPath']}/{key}" for key in keys}
    for reference in MANIFESTS["TriggerAuthentication"]["spec"]["secretTargetRef"]:
        assert reference["name"] == secret
        assert reference["key"] in keys


def test_probes_request_the_endpoints_of_the_worker() -> None:
    (port,) = CONTAINER["ports"]
    assert port["containerPort"] == PORT == int(POD["metadata"]["annotations"]["prometheus.io/port"])
    probes = {name: CONTAINER[name]["httpGet"] for name in ("startupProbe", "livenessProbe", "readinessProbe")}
    assert {probe["port"] for probe in probes.values()} == {port["name"]}
    assert [probe["path"] for probe in probes.values()] == ["/livez", "/livez", "/readyz"]


def test_workers_spread_over_zones_and_machines() -> None:
    """Without a requirement: where only one machine is left, all workers run there."""
    constraints = POD["spec"]["topologySpreadConstraints"]
    keys = {constraint["topologyKey"] for constraint in constraints}
    assert keys == {"topology.kubernetes.io/zone", "kubernetes.io/hostname"}
    assert {constraint["whenUnsatisfiable"] for constraint in constraints} == {"ScheduleAnyway"}
    assert [preferred["podAffinityTerm"]["topologyKey"] for preferred in ANTI_AFFINITY] == ["kubernetes.io/hostname"]


def test_the_container_has_the_resources_that_were_measured() -> None:
    """The memory of the measurement and of large messages, and the processor time of 32 requests of 50 ms at a time."""
    requests, limits = CONTAINER["resources"]["requests"], CONTAINER["resources"]["limits"]
    needed_mib = PERFORMANCE["worker.memory.peak_mib"] + HELD_MIB
    assert needed_mib < int(requests["memory"].removesuffix("Mi")) < 1.5 * needed_mib
    assert 1.5 * needed_mib < int(limits["memory"].removesuffix("Mi"))
    needed_milli = PERFORMANCE["worker.slow.per_s"] * PERFORMANCE["worker.slow.cpu_us"] / 1000
    assert needed_milli < int(requests["cpu"].removesuffix("m")) < 2 * needed_milli
    assert "cpu" not in limits


def test_the_network_policy_admits_what_the_worker_needs() -> None:
    policy = MANIFESTS["NetworkPolicy"]["spec"]
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    (port,) = CONTAINER["ports"]
    assert [rule["ports"] for rule in policy["ingress"]] == [[{"protocol": "TCP", "port": port["name"]}]]
    reached = {(one["protocol"], one["port"]) for rule in policy["egress"] for one in rule["ports"]}
    names, broker, store, platform = {("UDP", 53), ("TCP", 53)}, {5672, 5671}, {6379, 26379}, {443}
    assert reached == names | {("TCP", number) for number in broker | store | platform}


def test_a_cold_cluster_starts_in_any_order() -> None:
    """Nothing waits for another: a worker without a broker is live, so the startup probe does not restart it."""
    assert "initContainers" not in POD["spec"]
    assert SERVICES["worker"]["restart"] == "unless-stopped"  # a restarted engine ignores depends_on
    assert "fallback" not in MANIFESTS["ScaledObject"]["spec"]


def test_the_pod_is_unprivileged() -> None:
    assert POD["spec"]["securityContext"]["runAsNonRoot"]
    assert POD["spec"]["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert CONTAINER["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert MANIFESTS["ServiceAccount"]["automountServiceAccountToken"] is False


def test_no_password_is_in_any_file() -> None:
    """Checks URLs with passwords; placeholders in <> are allowed."""
    for path in (path for path in DOCKER.rglob("*") if path.is_file()):
        for password in re.findall(r"\w+://[^\s:/@]*:([^\s@]+)@", path.read_text()):
            assert password.startswith(("<", "{")), path
