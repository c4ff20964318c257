"""Which instructions of a listing are an inner loop's that multiplies, wherever the compiler has put them."""

from compressft_kernels.disassembly import Loop, count, inner_loops, read

# A persistent loop (0010 to 00f0) around two that multiply. The first waits at 0050 and goes on waiting behind the end
# of all, where its own way back lies too; a copy there and the loads before and after it are not its own.
LISTING = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;                       /* 0x00000a0000017a02 */
                                                                                /* 0x000fe40000000f00 */
        /*0010*/              @!P3 LDG.E R20, desc[UR20][R22.64] ;
        /*0020*/                   LDGSTS.E.BYPASS.128 [R53], desc[UR20][R26.64], P5 ;
        /*0030*/                   LDGDEPBAR ;
        /*0040*/                   UTCHMMA gdesc[UR6], gdesc[UR10], tmem[UR12], tmem[UR30], idesc[UR31], !UPT ;
        /*0050*/              @!P6 BRA 0x0110 ;
        /*0060*/                   LDGSTS.E.64 [R19], desc[UR12][R24.64], P1 ;
        /*0070*/                   BRA.U UP0, 0x0130 ;
        /*0080*/                   LDG.E.U8 R1, desc[UR12][R24.64] ;
        /*0090*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*00a0*/               @P1 BRA 0x00c0 ;
        /*00b0*/                   LDG.E.U8 R2, desc[UR12][R26.64] ;
        /*00c0*/               @P2 BRA 0x0080 ;
        /*00d0*/                   STG.E [R2.64], R4 ;
        /*00e0*/               @P3 EXIT ;
        /*00f0*/                   BRA 0x0010 ;
        /*0100*/                   LDGSTS.E [R19], desc[UR12][R24.64], P1 ;
        /*0110*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P6, [UR17], R2 ;
        /*0120*/                   BRA.U !UP1, 0x0150 ;
        /*0130*/                   IADD3 R4, R4, 0x1, RZ ;
        /*0140*/                   BRA 0x0040 ;
        /*0150*/              @!P6 BRA 0x0110 ;
        /*0160*/                   BRA 0x0060 ;
        /*0170*/                   BRA 0x0170;
"""


def test_instructions():
    found = read(LISTING)
    assert [one.place for one in found] == list(range(0, 0x180, 16))
    assert (found[1].predicate, found[1].name, found[1].operands) == ("@!P3", "LDG.E", "R20, desc[UR20][R22.64]")
    assert (count(found, "LDG\\b"), count(found, "LDGSTS"), count(found, "HMMA|UTC\\w*MMA")) == (3, 3, 2)


def test_inner_loops():
    """The first: 0040 to 0070 and 0110 to 0160; the second: 0080 to 00c0. Not the outer one, nor those that wait."""
    assert inner_loops(read(LISTING)) == (
        Loop(instructions=10, products=1, copies=1, loads=0),
        Loop(instructions=5, products=1, copies=0, loads=2),
    )


def test_without_a_loop():
    assert inner_loops(read("/*0000*/ HMMA.16816.F32 R4, R8, R12, R4 ;\n/*0010*/ EXIT ;\n/*0020*/ BRA 0x0020;")) == ()
