"""Where GroupQueryAttention of ONNX Runtime has its inputs."""

from enum import IntEnum


class Input(IntEnum):
    """Of com.microsoft.GroupQueryAttention, version 1; scales and lengths of queries came with ONNX Runtime 1.32."""

    QUERY = 0
    KEY = 1
    VALUE = 2
    PAST_KEY = 3
    PAST_VALUE = 4
    SEQUENCE_LENGTHS = 5
    TOTAL_LENGTH = 6
    COS = 7
    SIN = 8
    POSITIONS = 9
    BIAS = 10
    SINK = 11
    KEY_SCALE = 12
    VALUE_SCALE = 13
    QUERY_LENGTHS = 16
