"""A certificate as a picture: the losses of both runs on top of each other, and where one was killed."""

from pathlib import Path

from llmtrain.certify.certificate import Certificate

COLOURS = {"step": "tab:orange", "save": "tab:red", "evaluation": "tab:purple", "start": "tab:brown"}


def draw(certificate: Certificate, file: Path) -> None:
    """Write a PNG, atomically."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (losses, starts) = plt.subplots(
        2, 1, figsize=(9, 6.5), layout="constrained", sharex=True, height_ratios=[3, 2]
    )
    for name, style in (("whole", "-"), ("whole-without-dropout", "-")):
        if points := certificate.losses.get(name):
            losses.plot(*zip(*points, strict=True), style, color="0.75", linewidth=5, label=name.replace("-", " "))
    if points := certificate.losses.get("killed"):
        losses.plot(*zip(*points, strict=True), ".", color="tab:blue", markersize=5, label="killed and resumed")
    if points := certificate.losses.get("elastic"):
        ranks = " → ".join(map(str, certificate.elastic_ranks))
        losses.plot(*zip(*points, strict=True), "+", color="tab:green", label=f"on {ranks} ranks")
    losses.set_ylabel("training loss")
    losses.legend(frameon=False)
    verdict = "granted" if certificate.granted else "REFUSED"
    losses.set_title(f"Resume certificate of {certificate.recipe}: {verdict}, {len(certificate.kills)} kills")
    for index, kill in enumerate(certificate.kills):
        begin = kill.step if kill.began is None else kill.began
        starts.plot([begin, max(kill.step, begin)], [index, index], color="tab:blue", linewidth=2)
        hollow = {"markerfacecolor": "none"} if kill.rank is not None else {}
        starts.plot([kill.step], [index], "X", color=COLOURS[kill.kind], markersize=8, **hollow)
    for kind, colour in COLOURS.items():
        if number := certificate.by_kind().get(kind):
            starts.plot([], [], "X", color=colour, label=f"killed: {kind} ({number})")
    if any(kill.rank is not None for kill in certificate.kills):
        starts.plot([], [], "X", color="0.4", markerfacecolor="none", label="hollow: one rank alone")
    starts.invert_yaxis()
    starts.set_ylabel("start of the run")
    starts.set_xlabel("step")
    if certificate.kills:
        starts.legend(frameon=False, fontsize="small")
    temporary = file.with_name(f".{file.name}")
    figure.savefig(temporary, dpi=110, format="png")
    plt.close(figure)
    temporary.replace(file)
