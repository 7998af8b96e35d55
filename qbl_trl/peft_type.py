"""PeftType.QBLORA: PEFT's enumeration of methods, extended by ours.

PEFT's registry accepts only methods its own enumeration names, and reads `.value` of them. Enumerations are closed, so
the member is added by hand, once, the way `enum` itself builds members of a `str` enumeration.
"""

from peft import PeftType

NAME = "QBLORA"


def _extended() -> PeftType:
    if NAME in PeftType._member_map_:
        return PeftType(NAME)
    member = str.__new__(PeftType, NAME)
    member._name_ = NAME
    member._value_ = NAME
    type.__setattr__(PeftType, NAME, member)  # since Python 3.12 a member is an attribute of its class
    PeftType._member_map_[NAME] = member
    PeftType._value2member_map_[NAME] = member
    PeftType._member_names_.append(NAME)
    return PeftType(NAME)


QBLORA: PeftType = _extended()
