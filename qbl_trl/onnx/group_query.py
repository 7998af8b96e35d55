"""GroupQueryAttention of ONNX Runtime in place of an attention placeholder: where it fits, and its inputs."""

import onnx_ir as ir
import onnxruntime
from packaging.version import Version

from qbl_trl.onnx.gqa import Input
from qbl_trl.onnx.graph import MS_DOMAIN, Editor, attribute
from qbl_trl.onnx.masks import Masks, unrepeated
from qbl_trl.onnx.sites import Site
from qbl_trl.onnx.skeleton import Skeleton, Unfusable


def takes_query_lengths(provider: str) -> bool:
    """Whether GroupQueryAttention can be told how many queries each row has.

    On CPU it then continues a batch over a cache by any number of tokens, and reads positions of its own at every step.
    Without them it counts from the start of the cache, and ONNX Runtime refuses to continue a batch by more than one.
    """
    return provider == "cpu" and Version(onnxruntime.__version__) >= Version("1.32")


def told_positions(site: Site) -> bool:
    """Whether positions are an input. What the trace computes instead is counted from the length of the cache, which in
    a buffer of full length is another one than that of the text: there the operator counts for itself."""
    positions = None if site.table is None else site.table.inputs[1]
    return positions is not None and unrepeated(positions).is_graph_input()


def check_group_query(site: Site, skeleton: Skeleton, provider: str) -> None:
    """What ONNX Runtime asks of the sizes, and what an operator that counts positions itself cannot do.

    Raises:
        Unfusable: if the operator does not fit.
    """
    where = site.node.name
    if site.value_size != site.head_size:
        raise Unfusable(f"{where}: keys and values have heads of different sizes")
    if site.head_size % 8:
        raise Unfusable(f"{where}: GroupQueryAttention needs heads of a multiple of 8, not {site.head_size}")
    rotary = None if site.table is None else skeleton.rotary[attribute(site.table, "name")]
    if rotary is not None and rotary.width % 16:
        raise Unfusable(f"{where}: GroupQueryAttention rotates a multiple of 16 features, not {rotary.width} of a head")
    if site.sink is not None and provider == "cuda":  # as its library says, 1.31.1
        raise Unfusable(f"{where}: GroupQueryAttention has no kernel on CUDA for attention sinks beside padding")
    if rotary is not None and rotary.switch and not (takes_query_lengths(provider) and told_positions(site)):
        raise Unfusable(f"{where}: rotary angles of longrope change once a text is longer than {rotary.switch}")


def group_query(
    editor: Editor,
    site: Site,
    masks: Masks,
    tables: tuple[ir.Value, ir.Value] | None,
    rows: ir.Value | None,
    query_lengths: bool,
) -> ir.Node:
    """Causal by itself. Padding is an attention bias; seqlens_k counts all of the cache, padding included.

    Without query lengths or positions, tokens are rotated by their place in the cache: rotation is relative, so a row
    padded on the left is only shifted as a whole.

    Args:
        tables, rows: cosines and sines, and the rows of them that the new tokens read; None: nothing is rotated, or the
            operator counts.
    """
    attributes: dict[str, float | int] = {
        "num_heads": site.heads,
        "kv_num_heads": site.kv_heads,
        "scale": site.scale,
        "do_rotary": int(tables is not None),
    }
    if site.interleaved:
        attributes["rotary_interleaved"] = 1
    if site.window:  # both count the token itself
        attributes["local_window_size"] = site.window
    if site.softcap:
        attributes["softcap"] = site.softcap
    inputs = [site.query, site.key, site.value, site.past_key, site.past_value, *masks.lengths()]
    inputs += [*(tables or (None, None)), rows, masks.padding(site.bias), site.sink]
    if query_lengths:
        inputs += [None] * (Input.QUERY_LENGTHS - len(inputs)) + [masks.query_lengths()]
    while inputs[-1] is None:
        inputs.pop()
    return editor.add(
        site.node, "GroupQueryAttention", inputs, attributes, domain=MS_DOMAIN, outputs=3, like=site.past_value
    )
