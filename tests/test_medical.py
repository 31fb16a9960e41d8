"""DICOM and NIfTI, made by pydicom and nibabel."""

import gzip
import logging
import zipfile
from pathlib import Path

import imagecodecs
import nibabel
import numpy as np
import pydicom
import pytest
from conftest import tiny_config
from PIL import Image
from pydicom import uid
from pydicom.data import get_testdata_file
from pydicom.encaps import encapsulate
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, RLELossless, generate_uid

from ddpm_hf.data import pages
from ddpm_hf.data.config import DataConfig
from ddpm_hf.data.dataset import load_images
from ddpm_hf.data.decoding import Decoder
from ddpm_hf.data.folders import take_inventory
from ddpm_hf.data.medical import header_of, is_dicom_file
from ddpm_hf.data.pages import BadImage, WrongSetting
from ddpm_hf.data.reading import count_images, read_image
from ddpm_hf.data.sources import source_of
from ddpm_hf.training import train

NAME = "Doe^Erika"


def dicom(path, pixels, patient="12345", **tags):
    """Write (frames, H, W), (H, W) or, for RGB, (H, W, 3)."""
    header = pydicom.Dataset()
    header.file_meta = pydicom.dataset.FileMetaDataset()
    header.file_meta.MediaStorageSOPClassUID = header.SOPClassUID = CTImageStorage
    header.file_meta.MediaStorageSOPInstanceUID = header.SOPInstanceUID = generate_uid()
    header.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    header.PatientName, header.PatientID, header.SeriesInstanceUID = NAME, patient, generate_uid()
    bits = 8 * pixels.dtype.itemsize
    colour = pixels.ndim == 3 and pixels.shape[-1] == 3
    header.Rows, header.Columns = pixels.shape[:2] if colour else pixels.shape[-2:]
    header.SamplesPerPixel, header.PhotometricInterpretation = (3, "RGB") if colour else (1, "MONOCHROME2")
    if colour:
        header.PlanarConfiguration = 0
    elif pixels.ndim == 3:
        header.NumberOfFrames = len(pixels)
    header.BitsAllocated = header.BitsStored = bits
    header.HighBit, header.PixelRepresentation = bits - 1, int(pixels.dtype.kind == "i")
    header.PixelData = pixels.tobytes()
    for name, value in tags.items():
        setattr(header, name, value)
    header.save_as(path, enforce_file_format=True)
    return path


def ct(seed=0, side=8):
    return np.random.default_rng(seed).integers(0, 4096, (side, side), dtype=np.uint16)


def read(path, **settings):
    return read_image(path, None, **settings).colours


def test_values_are_in_hounsfield_units(tmp_path):
    stored = ct()
    path = dicom(tmp_path / "a.dcm", stored, RescaleSlope=1, RescaleIntercept=-1024, BitsStored=12, HighBit=11)
    assert (read(path)[..., 0] == stored.astype(int) - 1024).all()
    decoded = Decoder(1, value_range=(-1024, 3071))(path)
    assert (decoded.pixels[0] == stored.astype(np.float32) - 1024).all()
    half = dicom(tmp_path / "b.dcm", stored, RescaleSlope=0.5, RescaleIntercept=0)
    assert (read(half)[..., 0] == stored / 2).all()
    signed = dicom(tmp_path / "c.dcm", stored.astype(np.int16) - 1000)
    assert (read(signed)[..., 0] == stored.astype(int) - 1000).all()


def test_a_range_is_asked_for_and_the_window_is_told(tmp_path):
    path = dicom(
        tmp_path / "a.dcm", ct(), RescaleSlope=1, RescaleIntercept=-1024, WindowCenter=[40, 80], WindowWidth=[400, 9]
    )
    with pytest.raises(ValueError, match=r"--value_range BLACK WHITE \(viewers show it between -160 and 240: "
                       r"--value_range -160 240 --clip_values true\)"):  # fmt: skip
        Decoder(1)(path)
    assert Decoder(1, value_range=(-160, 240), clip_values=True)(path).pixels.max() == 240


def test_files_are_found_by_their_suffix_or_their_first_bytes(tmp_path):
    content = dicom(tmp_path / "a.dcm", ct()).read_bytes()
    for name in ("b.DICOM", "c.IMA", "1.2.840.113619.2.3.21", "IM000001"):
        (tmp_path / name).write_bytes(content)
    (tmp_path / "1.2.840.7").write_bytes(b"no DICOM")
    (tmp_path / "notes.txt").write_bytes(content)
    inventory = take_inventory(tmp_path)
    assert len(inventory.train) == 5
    assert dict(inventory.left_out) == {"without a known suffix": 1, ".txt": 1}


def test_monochrome1_is_inverted(tmp_path):
    """Its lowest value is white."""
    stored = ct()
    path = dicom(tmp_path / "a.dcm", stored, PhotometricInterpretation="MONOCHROME1", BitsStored=12, HighBit=11)
    assert (read(path)[..., 0] == 4095 - stored.astype(int)).all()
    signed = stored.astype(np.int16) - 2048
    path = dicom(tmp_path / "b.dcm", signed, PhotometricInterpretation="MONOCHROME1")
    assert (read(path)[..., 0] == -1 - signed.astype(int)).all()


def test_eight_bits_and_colours(tmp_path):
    gray = ct().astype(np.uint8)
    found = read(dicom(tmp_path / "a.dcm", gray))
    assert found.dtype == np.uint8
    assert (found[..., 0] == gray).all()
    colour = np.random.default_rng(0).integers(0, 256, (8, 6, 3), dtype=np.uint8)
    assert (read(dicom(tmp_path / "b.dcm", colour)) == colour).all()
    path = dicom(tmp_path / "c.dcm", gray)
    header = pydicom.dcmread(path)
    header.compress(RLELossless)
    header.save_as(path)
    assert (read(path)[..., 0] == gray).all()


def test_frames_are_images(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (3, 8, 6), dtype=np.uint8)
    path = dicom(tmp_path / "a.dcm", frames)
    assert count_images(path) == 3
    with pytest.raises(ValueError, match="has 3 frames: give --frames all"):
        read(path)
    for k in range(3):
        assert (read(path, frame=k)[..., 0] == frames[k]).all()


def test_broken_files_are_bad_images_whose_reason_tells_nothing_of_the_patient(tmp_path, monkeypatch):
    path = dicom(tmp_path / "a.dcm", ct())
    content = path.read_bytes()
    for broken in (content[:200], content[:-30], content.replace(b"MONOCHROME2", b"MONOCHROMEX")):
        with pytest.raises(BadImage) as found:
            read(broken)
        assert "Doe" not in str(found.value)
    del_rows = pydicom.dcmread(path)
    del del_rows.Rows
    del_rows.save_as(path)
    with pytest.raises(BadImage, match=r"is a DICOM file without a valid image \(AttributeError\)"):
        read(path)
    monkeypatch.setattr(pages, "MOST_BYTES", 100)
    with pytest.raises(BadImage, match="is too large: 8x8 values are 128 bytes when decoded"):
        read(dicom(tmp_path / "b.dcm", ct()))


def test_a_folder_of_dicom_trains_and_keeps_patients_together_and_secret(tmp_path, caplog, capfd):
    """Files without a suffix are found; neither name nor number of a patient is in the run, the log or the output."""
    data = tmp_path / "data"
    data.mkdir()
    for k in range(24):
        settings = {"RescaleSlope": 1, "RescaleIntercept": -1024, "BitsStored": 12, "HighBit": 11}
        dicom(data / (f"IM{k:04d}" if k % 2 else f"{k}.dcm"), ct(k), patient=f"patient-{k // 4}", **settings)
    (data / "README").write_text("not an image")
    broken = dicom(data / "broken.dcm", ct(), patient="patient-9")
    broken.write_bytes(broken.read_bytes()[:-60])
    assert [is_dicom_file(data / name) for name in ("0.dcm", "IM0001", "README")] == [True, True, False]
    patients = [header_of(data / name).group for name in ("0.dcm", "IM0001", "4.dcm")]
    group = patients[0]
    assert patients[0] == patients[1] != patients[2]
    settings = {"value_range": [-1024, 3071], "max_bad_fraction": 0.1}
    with caplog.at_level(logging.DEBUG):
        run = train(
            tiny_config(tmp_path / "run", train_data_dir=str(data), cache_dir=str(tmp_path / "cache"), **settings)
        )
    assert (len(run.images), len(run.held_out)) == (20, 4)
    held_out = {np.float32(x).tobytes() for x in run.held_out.pixels[:].numpy()}
    patients = {k // 4 for k in range(24) if (ct(k)[None].astype(np.float32) - 1024).tobytes() in held_out}
    assert len(patients) == 1
    out, err = capfd.readouterr()
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and data not in path.parents)
    for told in (out.encode(), err.encode(), caplog.text.encode(), written):
        assert b"Doe" not in told
        assert b"patient-" not in told
        assert group.encode() not in told
    assert "broken.dcm" in (tmp_path / "run/quarantine.csv").read_text()


def compressed(path, pixels, syntax, *frames, **tags):
    """A DICOM file whose frames are encoded already."""
    header = pydicom.dcmread(dicom(path, pixels, **tags))
    header.PixelData = encapsulate(list(frames))
    header["PixelData"].is_undefined_length = True
    header.file_meta.TransferSyntaxUID = syntax
    header.save_as(path, enforce_file_format=True)
    return path


ENCODERS = {uid.JPEGLosslessSV1: imagecodecs.ljpeg_encode, uid.JPEGLSLossless: imagecodecs.jpegls_encode}


@pytest.mark.parametrize("syntax", list(ENCODERS), ids=lambda syntax: syntax.keyword)
@pytest.mark.parametrize(("bits", "kind"), [(8, np.uint8), (8, np.uint16), (12, np.uint16), (16, np.uint16)])
def test_lossless_compression(tmp_path, syntax, bits, kind):
    stored = np.random.default_rng(0).integers(0, 2**bits, (3, 9, 7)).astype(np.uint8 if bits == 8 else np.uint16)
    frames = [ENCODERS[syntax](each) for each in stored]
    stored = stored.astype(kind)  # frames of 8 bits in a file of 16
    path = compressed(tmp_path / "a.dcm", stored, syntax, *frames, BitsStored=bits, HighBit=bits - 1)
    assert count_images(path) == 3
    for k, each in enumerate(stored):
        found = read(path, frame=k)[..., 0]
        np.testing.assert_array_equal(found, each)


@pytest.mark.parametrize(("name", "original"), [
    ("MR_small_jpeg_ls_lossless", "MR_small"), ("MR_small_RLE", "MR_small"), ("MR_small_jp2klossless", "MR_small"),
    ("SC_rgb_rle", "SC_rgb_rle_2frame"), ("SC_rgb_jpeg_gdcm", "SC_rgb_rle"), ("SC_rgb_jpeg_dcmtk", None),
    ("JPGExtended", None), ("JPEG-lossy", None),
])  # fmt: skip
def test_files_of_pydicom(name, original):
    path, number = get_testdata_file(f"{name}.dcm"), {"frames": "first"}
    if original is not None:
        np.testing.assert_array_equal(read(path), read(get_testdata_file(f"{original}.dcm"), **number))
        return
    pixels, header = read(path).astype(int), pydicom.dcmread(path)
    assert pixels.shape[:2] == (header.Rows, header.Columns)
    if pixels.shape[2] == 1:  # 12 bits, of which libjpeg-turbo makes what Pillow can't; it is a smooth picture
        assert 255 < pixels.max() < 4096
        assert np.abs(np.diff(pixels, axis=0)).mean() < 0.1 * pixels.std()
    else:
        lossless = read(get_testdata_file("SC_rgb_rle.dcm")).astype(int)
        assert np.abs(pixels - lossless).mean() < 3


def test_compression_that_nobody_reads_is_named(tmp_path):
    path = compressed(tmp_path / "a.dcm", ct().astype(np.uint8), uid.MPEG2MPML, b"film")
    with pytest.raises(BadImage, match="compressed as MPEG2 Main Profile / Main Level that can't be decoded"):
        read(path)
    with pytest.raises(BadImage, match="compressed as JPEG-LS Lossless Image Compression that can't be decoded"):
        read(compressed(tmp_path / "b.dcm", ct(), uid.JPEGLSLossless, b"\xff\xd8\xff\xf7 no image"))
    for syntax, encode in ENCODERS.items():
        with pytest.raises(BadImage, match="can't be decoded"):  # a frame of another size than in the header
            read(compressed(tmp_path / "c.dcm", ct(), syntax, encode(ct(side=9))))
    for syntax in (uid.HTJ2K, uid.HTJ2KLossless):
        path = compressed(tmp_path / "d.dcm", ct(), syntax, b"none")
        with pytest.raises(
            WrongSetting, match=r"JPEG 2000 .* needs another package: pip install pylibjpeg pylibjpeg-op"
        ):
            read(path)


def test_one_bit_is_black_and_white(tmp_path):
    path = dicom(tmp_path / "a.dcm", np.packbits(ct() > 2000, bitorder="little").reshape(1, 8), Rows=8, Columns=8,
                 BitsAllocated=1, BitsStored=1, HighBit=0)  # fmt: skip
    np.testing.assert_array_equal(read(path)[..., 0], 255 * (ct() > 2000))


def test_units_of_each_frame(tmp_path):
    """Enhanced CT and MR have rescale slope, intercept and window in functional groups."""

    def group(slope, intercept, center):
        values, window, item = pydicom.Dataset(), pydicom.Dataset(), pydicom.Dataset()
        values.RescaleSlope, values.RescaleIntercept = slope, intercept
        window.WindowCenter, window.WindowWidth = center, 10
        item.PixelValueTransformationSequence, item.FrameVOILUTSequence = [values], [window]
        return item

    stored = np.stack([ct(0), ct(1)])
    per_frame = [group(2, -1000, 40), group(1, 7, 50)]
    path = dicom(tmp_path / "a.dcm", stored, PerFrameFunctionalGroupsSequence=per_frame)
    for k, (slope, intercept) in enumerate([(2, -1000), (1, 7)]):
        assert (read(path, frame=k)[..., 0] == slope * stored[k].astype(int) + intercept).all()
    with pytest.raises(ValueError, match="viewers show it between 35 and 45"):
        Decoder(1)(path, 0)
    path = dicom(tmp_path / "b.dcm", stored, SharedFunctionalGroupsSequence=[group(3, 1, 0)])
    assert (read(path, frame=1)[..., 0] == 3 * stored[1].astype(int) + 1).all()


def order(folder):
    items, *_ = source_of(DataConfig(train_data_dir=str(folder), output_dir="elsewhere"))
    return "".join(Path(item.name).stem for item in items)


def test_slices_of_a_series_are_in_the_order_of_their_places(tmp_path):
    axial, sagittal = [1, 0, 0, 0, 1, 0], [0, 1, 0, 0, 0, -1]
    for k, name in enumerate("bcad"):  # the table moves down, so the names are against the places
        dicom(tmp_path / f"{name}.dcm", ct(k), SeriesInstanceUID="1.2", ImageOrientationPatient=axial,
              ImagePositionPatient=[0, 0, 2.5 * k], InstanceNumber=9 - k)  # fmt: skip
    for k, name in enumerate("zxy"):
        dicom(tmp_path / f"{name}.dcm", ct(k), SeriesInstanceUID="1.3", ImageOrientationPatient=sagittal,
              ImagePositionPatient=[2 - k, 5 * k, k])  # fmt: skip
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "e.png")
    for k, name in enumerate("hgf"):  # without places, by number
        dicom(tmp_path / f"{name}.dcm", ct(k), SeriesInstanceUID="1.4", InstanceNumber=k + 9)
    assert order(tmp_path) == "bcadehgfzxy"  # a series is where its first name is


def test_localizers_and_files_without_an_image_are_left_out(tmp_path, caplog):
    for k in range(3):
        dicom(tmp_path / f"{k}.dcm", ct(k))
    dicom(tmp_path / "scout.dcm", ct(side=16), ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    report = pydicom.dcmread(tmp_path / "0.dcm")
    for name in ("Rows", "Columns", "PixelData"):
        del report[name]
    report.save_as(tmp_path / "DICOMDIR")
    assert order(tmp_path) == "012"
    assert "left out: 1 file of DICOM without an image, 1 localizer of DICOM series" in caplog.text
    for k in range(3):
        (tmp_path / f"{k}.dcm").unlink()
    assert order(tmp_path) == "scout"  # there is nothing else


# ---------------------------------------------------------------- NIfTI


def nifti(path, shape=(6, 8, 10), dtype=np.int16, offset=0):
    """Voxel (x, y, z) has the value 100 x + 10 y + z + offset; x goes right, y to the front and z up."""
    x, y, z = np.meshgrid(*map(np.arange, shape), indexing="ij")
    volume = (100 * x + 10 * y + z + offset).astype(dtype)
    nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), path)
    return volume


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_slices_of_a_volume_are_upright(tmp_path, suffix):
    volume = nifti(tmp_path / f"a{suffix}")
    content = (tmp_path / f"a{suffix}").read_bytes()
    assert (content[:2] == b"\x1f\x8b") == (suffix == ".nii.gz")
    path = tmp_path / f"a{suffix}"
    with pytest.raises(ValueError, match="--slices"):
        read(path)
    assert [count_images(path, axis) for axis in (0, 1, 2)] == [10, 8, 6]
    axial = read(path, frame=0, slices=0)[..., 0]
    assert axial.shape == (8, 6)
    assert axial[0, 0] == volume[0, 7, 9]  # the front is above, and left is left
    assert axial[-1, -1] == volume[5, 0, 9]
    coronal = read(path, frame=0, slices=1)[..., 0]
    assert (coronal[0, 0], coronal[-1, -1]) == (volume[0, 7, 9], volume[5, 7, 0])  # the head is above


def test_the_affine_decides_what_is_up(tmp_path):
    """A volume stored the other way round is the same volume."""
    volume = nifti(tmp_path / "a.nii")
    turned = nibabel.Nifti1Image(volume[::-1, :, ::-1], np.diag([-1, 1, -1, 1]))
    nibabel.save(turned, tmp_path / "b.nii")
    for axis in (0, 1, 2):
        assert (read(tmp_path / "a.nii", frame=1, slices=axis) == read(tmp_path / "b.nii", frame=1, slices=axis)).all()


def test_a_flat_nifti_is_an_image(tmp_path):
    volume = nifti(tmp_path / "a.nii", shape=(6, 8, 1), dtype=np.uint8)
    found = read(tmp_path / "a.nii")
    assert found.dtype == np.uint8
    assert (found[..., 0] == volume[:, ::-1, 0].T).all()


def test_bombs_and_broken_volumes(tmp_path, monkeypatch):
    nifti(tmp_path / "a.nii")
    content = (tmp_path / "a.nii").read_bytes()
    monkeypatch.setattr("ddpm_hf.data.medical.MOST_OF_A_FILE", 1000)
    with pytest.raises(BadImage, match="is too large: it has more than 1,000 bytes when decompressed"):
        read(gzip.compress(content))
    with pytest.raises(BadImage):
        read(content[:400])
    nibabel.save(nibabel.Nifti1Image(np.zeros((4, 4, 4, 1, 3)), np.eye(4)), tmp_path / "b.nii")
    with pytest.raises(BadImage, match=r"is a NIfTI file of shape \(4, 4, 4, 1, 3\); it must be a volume or a time se"):
        read(tmp_path / "b.nii")


AFFINES = [np.eye(4), np.diag([-1, 1, -1, 1]), np.eye(4)[[1, 2, 0, 3]], np.diag([1, -1, 1, 1])[[2, 0, 1, 3]]]


@pytest.mark.parametrize("affine", AFFINES)
@pytest.mark.parametrize("shape", [(3, 4, 5), (3, 4, 5, 2), (3, 4, 1, 2), (3, 4, 5, 1)])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_each_volume_of_a_time_series_is_cut_into_slices(tmp_path, affine, shape, axis):
    """Compared with nibabel, which turns the whole series."""
    stored = np.random.default_rng(0).integers(-99, 99, shape, dtype=np.int16)
    image = nibabel.Nifti1Image(stored, affine)
    image.header.set_slope_inter(0.5, 3)
    nibabel.save(image, tmp_path / "a.nii")
    upright = nibabel.as_closest_canonical(nibabel.load(tmp_path / "a.nii")).get_fdata()
    upright = upright.reshape(*upright.shape[:3], -1).transpose(3, 2, 1, 0)[:, ::-1, ::-1]
    expected = [part for volume in upright for part in np.moveaxis(volume, axis, 0)]
    assert count_images(tmp_path / "a.nii", axis) == len(expected)
    found = [read(tmp_path / "a.nii", frame=k, slices=axis)[..., 0] for k in range(len(expected))]
    np.testing.assert_array_equal(found, expected)


def test_a_time_series_is_on_one_side(tmp_path):
    rng = np.random.default_rng(0)
    for k in range(3):
        values = rng.integers(0, 255, (6, 7, 4, 5), dtype=np.uint8)
        nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), tmp_path / f"{k}.nii.gz")
    config = DataConfig(train_data_dir=str(tmp_path), output_dir="elsewhere")
    with pytest.raises(ValueError, match=r"0.nii.gz is 5 volumes of 4x7x6 values: give --slices 0 \(axial\), 1 \(cor"):
        load_images(config)
    config.slices = 0
    images, held_out = load_images(config)
    assert (len(images), len(held_out), images.shape) == (40, 20, (1, 7, 6))
    config.slices = 3
    with pytest.raises(ValueError, match=r"is a NIfTI file, and --slices 3 must be 0 \(axial\)"):
        load_images(config)


def test_volumes_train(tmp_path):
    for k in range(3):
        nifti(tmp_path / f"data-{k}.nii.gz", offset=1000 * k)
    settings = {"slices": 0, "value_range": [0, 3000], "resolution": 8}
    run = train(tiny_config(tmp_path / "run", train_data_dir=str(tmp_path), **settings))
    assert (len(run.images), len(run.held_out)) == (20, 10)  # a volume is on one side


def test_numbers_in_headers_that_the_file_cannot_hold(tmp_path):
    """They would be an index of two billion frames, or terabytes of voxels."""
    path = dicom(tmp_path / "a.dcm", ct().astype(np.uint8), NumberOfFrames=2**31 - 1)
    with pytest.raises(BadImage, match="is broken: it says that it has 2,147,483,647 frames, and it has"):
        read(path)
    assert count_images(path) == 1
    nifti(tmp_path / "a.nii")
    content = bytearray((tmp_path / "a.nii").read_bytes())
    content[42:48] = np.array([32767] * 3, "<i2").tobytes()
    with pytest.raises(BadImage, match="is cut off: it says that it has 70,362,301,923,326 bytes of values"):
        read(bytes(content), slices=0, frame=0)


def test_medical_files_in_an_archive(tmp_path):
    """Headers are read without the pixels, also where a file can't be mapped."""
    data = tmp_path / "data"
    data.mkdir()
    for k in range(6):
        dicom(data / f"{5 - k}", ct(k), patient=f"patient-{k // 2}", InstanceNumber=k, SeriesInstanceUID=f"1.{k // 2}")
    with zipfile.ZipFile(tmp_path / "data.zip", "w", zipfile.ZIP_DEFLATED) as file:
        for path in data.iterdir():
            file.write(path, path.name)
    found = []
    for place in (data, tmp_path / "data.zip"):
        config = DataConfig(train_data_dir=str(place), output_dir="elsewhere", value_range=[0, 4095])
        items, *_ = source_of(config)
        found.append(
            ([(Path(item.name).name, item.group) for item in items], *[p.fingerprint for p in load_images(config)])
        )
    assert found[0] == found[1]
    assert [name for name, _ in found[0][0]] == ["1", "0", "3", "2", "5", "4"]
    assert len({group for _, group in found[0][0]}) == 3
