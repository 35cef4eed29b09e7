"""A sweep's files: rows with their predictions, kept through kills, never mixed with those of another run."""

import io
import json
import random
import zipfile

import numpy as np
import pytest
from helpers import LABELS, contents, made_predictions, made_row

from sparsity.results.store import join_parts, open_sweep, read_sweep
from sparsity.system.errors import UserError

CURVE, GLOBAL, RANDOM = ("l1", "uniform", "none"), ("l1", "global", "none"), ("random", "uniform", "none")
LAYERS = {"stem": 200, "down": 800}
ZEROS = {"stem": 21, "down": 84}
BOTH = {"one.pth": {"sha256": "1"}, "two.pth": {"sha256": "2"}}


def header(checkpoints=("one.pth",), **changes):
    return {
        "settings": {"precision": "fp32", "batch_size": 32} | changes,
        "data": {"classes": list("abcd"), "test_sha256": "data"},
        "checkpoints": {name: BOTH[name] for name in checkpoints},
    }


def reopen(files, head=None, layers=LAYERS, restart=False):
    return open_sweep(files, head or header(), LABELS, layers, restart)


def begin(files, head=None, restart=False, checkpoints=("one.pth",)):
    """A sweep with its dense networks."""
    sweep = reopen(files, head, restart=restart)
    sweep.begin()
    for name in checkpoints:
        sweep.add_dense(name, LABELS, {"accuracy": 100.0, "loss": 0.1})
    return sweep


def add(sweep, *rows):
    for each in rows:
        sweep.add(each, made_predictions(each.level), ZEROS)


def fill(files, levels=(0.0, 40.0), **changes):
    sweep = begin(files, header(**changes))
    add(sweep, *map(made_row, levels))
    return sweep


@pytest.mark.parametrize(("classes", "dtype"), [(4, np.uint8), (300, np.uint16)])
def test_rows_come_back_with_their_predictions_and_added_levels_go_to_their_place(files, classes, dtype):
    head = header()
    head["data"]["classes"] = [str(index) for index in range(classes)]
    add(begin(files, head), made_row(0.0), made_row(40.0))
    again = reopen(files, head)
    add(again, made_row(50.0))
    again.add(made_row(9.0), made_predictions(9) + classes - 4, ZEROS)
    assert again.has("one.pth", CURVE, 9.0) and not again.has("one.pth", CURVE, 10.0)
    found = read_sweep(files)
    assert found.table() == list(map(made_row, (0.0, 9.0, 40.0, 50.0)))
    assert np.array_equal(found.dense["one.pth"], LABELS)
    assert found.layers == LAYERS
    for row in found.table():
        predictions, zeros = found.predictions[row.key], found.zeros[row.key]
        assert np.array_equal(predictions, made_predictions(row.level) + (row.level == 9) * (classes - 4))
        assert zeros.tolist() == [21, 84] and (predictions.dtype, zeros.dtype) == (dtype, np.int64)
    assert np.array_equal(found.correct(made_row(40.0)), made_predictions(40) == LABELS)


@pytest.mark.parametrize("last", [20.0, 40.0])
def test_a_kill_while_a_row_is_written_loses_only_that_row_and_the_sweep_goes_on(files, last):
    """Its predictions are on the disk and the CSV is not; a row that is measured again is not lost either."""
    sweep = fill(files, (0.0, 20.0))
    table = files.csv.read_bytes()
    add(sweep, made_row(last))
    files.csv.write_bytes(table)
    found = reopen(files)
    assert [each.level for each in found.table()] == [0, 20]
    assert set(found.predictions) == {made_row(0.0).key, made_row(20.0).key}
    found.begin()
    add(found, made_row(60.0))
    again = read_sweep(files)
    assert [each.level for each in again.table()] == [0, 20, 60]
    assert all(np.array_equal(again.predictions[row.key], made_predictions(row.level)) for row in again.table())


def test_the_predictions_are_compressed_in_the_end(files):
    sweep = fill(files, range(40))
    found, size = read_sweep(files), files.npz.stat().st_size
    sweep.pack()
    packed = read_sweep(files)
    assert files.npz.stat().st_size < size / 2 and packed.table() == found.table() and len(found.table()) == 40
    for key, predictions in found.predictions.items():
        assert np.array_equal(packed.predictions[key], predictions)
        assert np.array_equal(packed.zeros[key], found.zeros[key])


def test_another_checkpoint_may_be_added_but_none_replaced(files):
    fill(files)
    add(begin(files, header(BOTH), checkpoints=("two.pth",)), made_row(0.0, "two.pth"))
    assert [each.checkpoint for each in read_sweep(files).table()] == ["one.pth", "one.pth", "two.pth"]
    with pytest.raises(UserError, match="checkpoint"):
        reopen(files)
    with pytest.raises(UserError, match=r"one.pth has changed"):
        reopen(files, header(BOTH) | {"checkpoints": BOTH | {"one.pth": {"sha256": "other"}}})


def test_other_settings_images_and_layers_are_named_and_nothing_is_touched(files):
    fill(files).begin(calibration_sha256="a", training_sha256=None)
    reopen(files).begin(calibration_sha256=None, training_sha256="t")  # a run that needs other images than the first
    before = contents(files.stem.parent)
    with pytest.raises(UserError, match=r"precision \(fp32 there, bf16 now\).*--restart.*--name"):
        reopen(files, header(precision="bf16"))
    with pytest.raises(UserError, match=r"test_sha256 \(data there, other now\)"):
        reopen(files, header() | {"data": header()["data"] | {"test_sha256": "other"}})
    for layers in ({"stem": 200}, LAYERS | {"more": 5}, LAYERS | {"down": 799}):
        with pytest.raises(UserError, match=r"prunable layers or their sizes \((down|more)\).*--restart.*--name"):
            reopen(files, layers=layers)
    for hashes in ({"calibration_sha256": "b"}, {"training_sha256": "u"}):
        with pytest.raises(UserError, match=f"rows of other {next(iter(hashes)).split('_')[0]} images"):
            reopen(files).begin(**hashes)
    assert contents(files.stem.parent) == before
    # The order of layers is that of the files: the counts of a row are found by name.
    again = reopen(files, layers=dict(reversed(LAYERS.items())))
    again.add(made_row(5.0), made_predictions(5), dict(reversed(ZEROS.items())))
    assert read_sweep(files).zeros[made_row(5.0).key].tolist() == [21, 84]


def test_rows_alone_tie_settings_and_only_those_that_they_use(files):
    for precision in ("bf16", "fp32"):
        reopen(files, header(precision=precision)).begin()
        assert json.loads(files.json.read_text())["settings"]["precision"] == precision  # before the first row
        assert not files.csv.exists()
    fill(files)
    reopen(files, header(calibration_images=64)).begin()
    assert reopen(files, header(calibration_images=None)).header["settings"]["calibration_images"] == 64
    with pytest.raises(UserError, match=r"calibration_images \(64 there, 32 now\)"):
        reopen(files, header(calibration_images=32))


def test_curves_stand_in_the_order_of_the_header_then_by_alphabet_and_going_on_with_others_loses_none(files):
    sweep, last = begin(files, header() | {"curves": [list(RANDOM), list(CURVE)]}), ("x", "b", "none")
    add(sweep, *(made_row(0.0, curve=curve) for curve in (CURVE, RANDOM, last, ("a", "b", "none"))))
    for curves in ({"curves": [list(GLOBAL), list(CURVE)]}, {}):
        again = reopen(files, header() | curves)
        assert again.header["curves"] == [list(RANDOM), list(CURVE), list(GLOBAL)]
        again.begin()
    add(again, made_row(0.0, curve=GLOBAL))
    found = read_sweep(files)
    curves = [each.curve for each in found.table()]
    assert curves == list(found.curves()) == [RANDOM, CURVE, GLOBAL, ("a", "b", "none"), last]


def test_a_restart_sets_complete_rows_aside_until_the_new_ones_are_complete(files):
    fill(files)
    old = contents(files.stem.parent)
    sweep = reopen(files, header(precision="bf16"), restart=True)
    assert contents(files.stem.parent) == old  # what can fail comes before rows go
    sweep.begin()
    aside = {path.with_name(path.name + ".old"): content for path, content in old.items()}
    assert aside.items() <= contents(files.stem.parent).items()
    sweep.add_dense("one.pth", LABELS, {"accuracy": 100.0, "loss": 0.1})
    add(sweep, made_row(5.0))
    begin(files, header(precision="bf16"), restart=True)  # again, after a kill: the partial rows go, the complete stay
    assert aside.items() <= contents(files.stem.parent).items()
    assert not [path for path in contents(files.stem.parent) if path == files.csv]
    files.drop_old()
    assert not aside.keys() & contents(files.stem.parent).keys()


def test_the_summary_stays_rows_of_another_machine_are_told_and_the_fingerprint_tells_settings_apart(files, capsys):
    first, second = (header() | {"machine": {"device": name}} for name in ("this one", "that one"))
    sweep = begin(files, first)
    add(sweep, made_row(0.0))
    sweep.record("summary", [{"level": 40}])
    again = reopen(files, second)
    assert "come from this one, new ones from that one" in capsys.readouterr().out
    assert again.header["summary"] == [{"level": 40}]
    prints = {sweep.fingerprint(), again.fingerprint()}
    again.begin(calibration_sha256="a")
    prints.add(again.fingerprint())
    again.header["settings"]["precision"] = "bf16"
    assert len(prints) == 2 and again.fingerprint() not in prints


def run_by(command, processes=1):
    return {"command": command, "machine": {"device": "this one", "processes": processes}, "versions": {"numpy": "2"}}


def commands(files):
    return [(run["command"], run["machine"]["processes"]) for run in json.loads(files.json.read_text())["commands"]]


def test_every_command_that_added_rows_is_kept_with_its_machine_and_versions(files):
    sweep = begin(files, header() | run_by("first"))
    add(sweep, made_row(0.0), made_row(40.0))
    reopen(files, header() | run_by("nothing new")).begin()
    again = reopen(files, header() | run_by("by two", 2))
    again.begin()
    parts = [again.part(1)]
    add(parts[0], made_row(50.0))
    assert commands(files) == [("first", 1)]
    again.join(read_sweep(part) for part in files.parts())
    assert commands(files) == [("first", 1), ("by two", 2)]
    assert json.loads(files.json.read_text())["commands"][0] == run_by("first")
    again = reopen(files, header() | run_by("controls"))
    for _ in range(2):
        again.merge("controls", {"a": {"sha256": "1"}})
    assert commands(files)[2:] == [("controls", 1)]
    restarted = reopen(files, header() | run_by("all again"), restart=True)
    restarted.begin()
    add(restarted, made_row(0.0))
    assert commands(files) == [("all again", 1)]


@pytest.mark.parametrize("killed", [False, True])
def test_parts_of_several_processes_are_joined_in_the_order_of_one(files, killed):
    sweep = begin(files)
    parts = [sweep.part(1), sweep.part(2)]
    for part in parts:
        part.begin()
    add(parts[1], made_row(40.0), made_row(5.0))
    parts[1].merge("exports", {made_row(5.0).key: {"bytes": 1}})
    add(parts[0], made_row(20.0))
    if not killed:
        add(sweep, made_row(0.0))
        sweep.join(read_sweep(part) for part in files.parts())
    else:  # at the next start, where the first process may not have finished a row
        join_parts(files)
    assert [row.level for row in read_sweep(files).table()] == ([] if killed else [0]) + [5, 20, 40]
    assert read_sweep(files).header["exports"] == {made_row(5.0).key: {"bytes": 1}}
    assert not [path for path in contents(files.stem.parent) if "_part" in path.name]
    join_parts(files)  # with nothing to join
    assert np.array_equal(read_sweep(files).predictions[made_row(5.0).key], made_predictions(5))
    part = sweep.part(1)
    part.begin()
    add(part, made_row(60.0))
    part.files.npz.write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"part1.npz cannot be read"):
        join_parts(files)
    join_parts(files, restart=True)  # does without them
    assert not [path for path in contents(files.stem.parent) if "_part" in path.name]


@pytest.mark.parametrize("packed", [True, False])
def test_damaged_files_are_told_in_one_line_or_mean_the_same(files, packed):
    """Bytes flipped, cut and spliced at seeded places of each file, in the deflate streams of the NPZ too."""
    sweep = fill(files)
    if packed:
        sweep.pack()
    draw, whole = random.Random(0), read_sweep(files)
    for path in (files.csv, files.json, files.npz):
        good = path.read_bytes()
        for _ in range(60):
            place, kind = draw.randrange(len(good)), draw.randrange(3)
            flipped = bytes([good[place] ^ 1 << draw.randrange(8)]) + good[place + 1 :]
            path.write_bytes(good[:place] + (flipped, b"", draw.randbytes(20) + good[place:])[kind])
            try:
                found = read_sweep(files)
            except UserError as error:
                assert files.stem.name in str(error) and "\n" not in str(error)
            else:
                same = (np.array_equal(found.predictions[key], whole.predictions[key]) for key in found.rows)
                assert path != files.npz or all(same)
        path.write_bytes(good)


def rewrite(files, name, bad):
    """Replace an array of the NPZ by another, or by the bytes of another."""
    with np.load(files.npz) as found:
        arrays = dict(found) | {name: bad}
    with zipfile.ZipFile(files.npz, "w") as archive:
        for key, array in arrays.items():
            with archive.open(f"{key}.npy", "w") as member:
                member.write(array) if isinstance(array, bytes) else np.save(member, array)


def test_arrays_that_do_not_fit_each_other_or_claim_an_absurd_shape_are_damage(files):
    whole, claim = fill(files), io.BytesIO()
    np.lib.format.write_array_header_1_0(claim, {"descr": "|u1", "fortran_order": False, "shape": (2**50,)})
    predictions = np.array(list(whole.predictions.values()))
    for name, bad in (
        ("rows", np.array([made_row(0.0).key])),
        ("predictions", predictions[:, :5]),
        ("predictions", predictions.astype(float)),
        ("predictions", claim.getvalue()),
        ("dense_checkpoints", np.array(["other.pth"])),
        ("labels", np.array([None, 1])),
        ("layer_zeros", np.array([[21], [21]])),
    ):
        whole._write_predictions()
        rewrite(files, name, bad)
        with pytest.raises(UserError, match=r"net_pruning.npz cannot be read.*--restart"):
            read_sweep(files)


def test_rows_without_their_settings_are_not_trusted(files):
    fill(files)
    content = json.loads(files.json.read_text())
    for part in ("settings", "data", "checkpoints", "dense"):
        for bad in ({}, {part: 5}):
            files.json.write_text(json.dumps({key: value for key, value in content.items() if key != part} | bad))
            with pytest.raises(UserError, match="cannot be read"):
                read_sweep(files)
    files.json.unlink()
    with pytest.raises(UserError, match=r"has no net_pruning.json beside it"):
        reopen(files)
