/*
 * The built-in guest: a stand-alone PVH ELF that goes to ring 3 on every vCPU and beats.
 *
 * Ring 0 is emulated on some hosts at about one instruction per microsecond (kvm_pvm, see README.md), so
 * page tables, GDT, IDT and TSSes are data of this image, and whatever can run in ring 3 does: memory map,
 * upper page tables, start of the other processors. Ring 0 is left again by sysexitq, because iretq and lret
 * are not emulated there; where sysexitq is not to be had (AMD, in long mode) it raises #UD and the handler
 * turns to iretq. No interrupt is ever enabled; no SSE, no AVX.
 *
 * The numbers below are a contract with src/payload.rs; a test compares the two.
 */

/* ---- Guest-physical layout (identity mapped) ---------------------------------------------------------- */
#define TRAMPOLINE      0x8000          /* real-mode entry of the other processors: SIPI vector 8 */
#define MAILBOX         0x100000        /* MAX_VCPUS pages */
#define MAX_VCPUS       64
#define TEXT            0x200000        /* the rest is placed by payload.ld and asserted there */
#define STUBS           0x202000
#define GDT             0x203000
#define PML4            0x204000
#define PDPT            0x205000
#define PD0             0x206000        /* four pages: the first 4 GiB, static */
#define TSS             0x20a000        /* MAX_VCPUS * TSS_BYTES, then the I/O bitmap of all of them */
#define FILL_BASE       0x400000        /* everything of the payload lies below */
#define MAPPED_GIB      256

#define TSS_BYTES       128
#define TSS_RSP0        4
#define TSS_IOMAP       102
#define IO_BITMAP       (TSS + MAX_VCPUS * TSS_BYTES)
#define IO_BITMAP_BYTES (0x10000 / 8)
#define STACK_BYTES     1024

#define KERNEL_CS       0x08
#define KERNEL_DS       0x10
#define USER_CS         0x2b            /* sysexitq: SYSENTER_CS + 32, and + 40 for SS */
#define USER_SS         0x33
#define TSS_SELECTOR    0x40

/* ---- Mailbox: header, in page 0 only ------------------------------------------------------------------ */
#define H_MAGIC         0x000
#define H_VERSION       0x008
#define H_STARTED       0x010
#define H_MASK          0x018
#define H_USABLE        0x020
#define H_FLAGS         0x028
#define H_RANGES        0x030
#define H_TSC_ENTRY     0x038
#define H_TSC_READY     0x040
#define H_RANGE         0x080
#define MAX_RANGES      8

#define FLAG_NO_SERIAL  0x01
#define FLAG_IRETQ      0x02
#define FLAG_NO_IOPL    0x04
#define FLAG_NO_LAPIC   0x08
#define FLAG_RAM_CUT    0x10

#define MAGIC           0x314c594150525043      /* "CPRPAYL1" */
#define LAYOUT          1

/* ---- Mailbox: written by each vCPU -------------------------------------------------------------------- */
#define V_BEATS         0x100
#define V_LAST_TSC      0x108
#define V_MAX_GAP       0x110
#define V_MAX_GAP_AT    0x118
#define V_GAP_ACK       0x120
#define V_BACKWARDS     0x128
#define V_DONE_SEQ      0x140
#define V_STATUS        0x148
#define V_RESULT0       0x150
#define V_RESULT1       0x158
#define V_PROGRESS      0x160
#define V_WALKED        0x168
#define V_ECHOED        0x170
#define V_STATE         0x178
#define V_APIC_ID       0x180
#define V_TSC_START     0x188
#define V_IO_FAULTS     0x190
#define V_FAULT         0x1a0           /* vector, error code, rip, cr2 */

#define STATE_BEATING   1
#define STATE_PARKED    2
#define STATE_FAULTED   3

#define STATUS_OK       0
#define STATUS_UNKNOWN  1
#define STATUS_NO_IO    2
#define STATUS_RANGE    3

/* ---- Mailbox: written by the harness ------------------------------------------------------------------ */
#define V_DOORBELL      0x200
#define V_GAP_REQ       0x208
#define V_CMD_SEQ       0x210
#define V_CMD           0x218
#define V_ARG0          0x220
#define V_ARG1          0x228
#define V_ARG2          0x230

/* ---- Mailbox: private to the guest -------------------------------------------------------------------- */
#define V_WALK_BASE     0x300
#define V_WALK_BYTES    0x308
#define V_WALK_POS      0x310

#define CHUNK           0x10000         /* long commands beat each time they cross such a boundary */

/* word(address, seed) = x ^ (x >> 32), x = address * PATTERN_STEP + seed * PATTERN_SEED + PATTERN_BASE */
#define PATTERN_STEP    0x9e3779b97f4a7c15
#define PATTERN_SEED    0xd1b54a32d192ed03
#define PATTERN_BASE    0x8cb92ba72f3d8dd7

#define COM1            0x3f8
#define COM1_FCR        0x3fa
#define COM1_LSR        0x3fd
#define LSR_POLLS       256             /* a character is sent after so many polls even if THRE stays 0 */

#define MSR_APIC_BASE   0x1b
#define MSR_SYSENTER_CS 0x174
#define MSR_EFER        0xc0000080
#define LAPIC           0xfee00000
#define LAPIC_ID        0x20
#define LAPIC_SVR       0xf0
#define LAPIC_ICR       0x300
#define ICR_INIT_OTHERS 0xc4500         /* INIT, assert, all excluding self */
#define ICR_SIPI_OTHERS (0xc4600 | (TRAMPOLINE >> 12))
#define INIT_WAIT_TSC   (1 << 19)       /* INIT to SIPI: 0.1 to 0.3 ms */
#define QUIET_TSC       (1 << 27)       /* no further processor for so long, about 50 ms: that was all */
#define NAMED_WAIT_SHIFT 33             /* with cpus=N: 2^33 cycles, some seconds, until N are there */

/* hvm_start_info and its memory map, Xen's public/arch-x86/hvm/start_info.h */
#define START_VERSION   4
#define START_CMDLINE   24
#define START_MEMMAP    40
#define START_ENTRIES   48
#define MEMMAP_RAM      1

#define MODE_ECHO       1
#define MODE_WALK       2

/* ======================================================================================================= */
        .section .note.Xen, "a", @note
        .balign 4
        .long   4, 8, 18                /* name size, descriptor size, XEN_ELFNOTE_PHYS32_ENTRY */
        .asciz  "Xen"
        .quad   start32                 /* eight bytes, as Linux has it: QEMU reads that many from an ELF64 */

        .section .note.GNU-stack, "", @progbits

/* ---- Ring 0 ------------------------------------------------------------------------------------------- */
        .text
        .code32
        .globl  start32
start32:
        cli
        movl    %ebx, start_info
        rdtsc
        movl    %eax, tsc_entry
        movl    %edx, tsc_entry + 4
        lgdt    gdt_pointer
        movl    $0x20, %eax             /* PAE */
        movl    %eax, %cr4
        movl    $PML4, %eax
        movl    %eax, %cr3
        movl    $MSR_EFER, %ecx
        rdmsr
        orl     $0x100, %eax            /* LME */
        wrmsr
        movl    %cr0, %eax
        orl     $0x80000001, %eax       /* PG, PE */
        movl    %eax, %cr0
        ljmp    $KERNEL_CS, $start64

        .code64
start64:
        movw    $KERNEL_DS, %ax
        movw    %ax, %ds
        movw    %ax, %es
        movw    %ax, %ss
        movl    $kernel_stacks + STACK_BYTES, %esp

        /* "noiopl" on the command line: leave ring 3 without port I/O, as some VMMs do. */
        movl    start_info, %ebx
        movl    START_CMDLINE(%rbx), %ebx
        testl   %ebx, %ebx
        jz      2f
1:      cmpl    $0x6f696f6e, (%rbx)     /* "noio" */
        je      3f
        cmpb    $0, (%rbx)
        je      2f
        incl    %ebx
        jmp     1b
3:      movl    $0x2, user_flags
2:
        /* CPUID is asked here: in ring 3 kvm_pvm may show the host's. */
        movl    $1, %eax
        cpuid
        shrl    $9, %edx
        andl    $1, %edx
        movl    %edx, have_lapic
        jz      enter_bsp
        /* A VMM that hands over in x2APIC mode: back to xAPIC, through "off" as the SDM demands. */
        movl    $MSR_APIC_BASE, %ecx
        rdmsr
        testl   $0x400, %eax
        jz      enter_bsp
        andl    $~0xc00, %eax
        wrmsr
        orl     $0x800, %eax
        wrmsr
enter_bsp:
        xorl    %edi, %edi
        jmp     enter_user

/* Another processor, from the trampoline, no stack yet. Its page is the one of its APIC id. */
start_ap:
        movw    $KERNEL_DS, %ax
        movw    %ax, %ds
        movw    %ax, %es
        movw    %ax, %ss
        movl    $LAPIC, %eax
        movl    LAPIC_ID(%rax), %edi
        shrl    $24, %edi
        jz      park_ap                 /* id 0 is the boot processor's page */
        cmpl    $MAX_VCPUS, %edi
        jae     park_ap
        leal    1(%rdi), %esp
        shll    $10, %esp               /* STACK_BYTES */
        addl    $kernel_stacks, %esp
        jmp     enter_user
park_ap:
        hlt
        jmp     park_ap

/* edi: index of this vCPU, kept for ring 3. */
enter_user:
        lidt    idt_pointer
        movl    %edi, %eax
        shll    $4, %eax
        addl    $TSS_SELECTOR, %eax
        ltr     %ax
        testb   $0x30, user_flags + 1
        jnz     1f
        movl    %edi, %eax              /* no IOPL: take the I/O bitmap away, too */
        shll    $7, %eax                /* TSS_BYTES */
        movw    $0xffff, TSS + TSS_IOMAP(%rax)
1:      movl    $MSR_SYSENTER_CS, %ecx
        xorl    %edx, %edx
        movl    $KERNEL_CS, %eax
        wrmsr
        movl    user_flags, %eax
        pushq   %rax
        popfq
        leal    1(%rdi), %ecx
        shll    $10, %ecx
        addl    $user_stacks, %ecx
        movl    $user_start, %edx

/* rdx: rip, rcx: rsp in ring 3. */
to_user:
        cmpb    $0, use_iretq
        jne     1f
sysexit_instruction:
        sysexitq
1:      pushq   $USER_SS
        pushq   %rcx
        pushfq
        pushq   $USER_CS
        pushq   %rdx
        iretq

/*
 * Every exception: vector, error code, rip, cs, rflags, rsp, ss on the stack. Two are expected; the others
 * are written down and end this vCPU.
 */
fault:
        cmpq    $6, (%rsp)              /* #UD of our own sysexitq: rdx and rcx are as they were */
        jne     1f
        cmpq    $sysexit_instruction, 16(%rsp)
        jne     fault_unexpected
        movb    $1, use_iretq
        jmp     to_user
1:      cmpq    $13, (%rsp)             /* #GP of a port access in ring 3 */
        jne     fault_unexpected
        testb   $3, 24(%rsp)
        jz      fault_unexpected
        cmpq    $port_io_start, 16(%rsp)
        jb      fault_unexpected
        cmpq    $port_io_end, 16(%rsp)
        jae     fault_unexpected
        movq    40(%rsp), %rcx
        movl    $port_io_failed, %edx
        jmp     to_user
fault_unexpected:
        movq    %rsp, %rbx
        subq    $kernel_stacks, %rbx
        shrq    $10, %rbx
        shlq    $12, %rbx
        addq    $MAILBOX, %rbx
        movq    0(%rsp), %rax
        movq    %rax, V_FAULT(%rbx)
        movq    8(%rsp), %rax
        movq    %rax, V_FAULT + 8(%rbx)
        movq    16(%rsp), %rax
        movq    %rax, V_FAULT + 16(%rbx)
        movq    %cr2, %rax
        movq    %rax, V_FAULT + 24(%rbx)
        movq    $STATE_FAULTED, V_STATE(%rbx)
1:      hlt
        jmp     1b

/* ---- The trampoline, copied to TRAMPOLINE ------------------------------------------------------------- */
        .code16
trampoline:
        cli
        xorw    %ax, %ax
        movw    %ax, %ds
        lgdtl   TRAMPOLINE + (trampoline_gdt - trampoline)
        movl    $0x20, %eax
        movl    %eax, %cr4
        movl    $PML4, %eax
        movl    %eax, %cr3
        movl    $MSR_EFER, %ecx
        xorl    %edx, %edx
        movl    $0x100, %eax
        wrmsr
        movl    $0x80000011, %eax       /* PG, ET, PE; caches on */
        movl    %eax, %cr0
        ljmpl   $KERNEL_CS, $start_ap
        .balign 4
trampoline_gdt:
        .word   gdt_end - gdt - 1
        .long   GDT
        .balign 4
trampoline_end:

/* ---- Ring 3 -------------------------------------------------------------------------------------------
 * For as long as a vCPU beats: rbx its mailbox page, r8 last TSC, r9 largest gap, r10 beats, r12 mode bits,
 * r14 the doorbell's last value. Everything else is scratch.
 */
        .code64
user_start:
        movl    %edi, %ebx
        shll    $12, %ebx
        addl    $MAILBOX, %ebx
        movl    %edi, %r13d
        movl    %ebx, %edi
        xorl    %eax, %eax
        movl    $4096 / 8, %ecx
        rep stosq
        movl    %r13d, V_APIC_ID(%rbx)
        rdtsc
        shlq    $32, %rdx
        orq     %rdx, %rax
        movq    %rax, V_TSC_START(%rbx)
        movq    %rax, %r8
        xorl    %r9d, %r9d
        xorl    %r10d, %r10d
        xorl    %r12d, %r12d
        xorl    %r14d, %r14d
        movq    $STATE_BEATING, V_STATE(%rbx)
        testl   %r13d, %r13d
        jz      user_bsp
        lock btsq %r13, MAILBOX + H_MASK
        lock incq MAILBOX + H_STARTED
        jmp     beat

user_bsp:
        movq    $LAYOUT, H_VERSION(%rbx)
        movq    tsc_entry, %rax
        movq    %rax, H_TSC_ENTRY(%rbx)
        movq    $1, H_MASK(%rbx)
        movq    $1, H_STARTED(%rbx)
        testb   $0x30, user_flags + 1
        jnz     1f
        lock orq $FLAG_NO_IOPL, H_FLAGS(%rbx)
1:      cmpb    $0, use_iretq
        je      1f
        lock orq $FLAG_IRETQ, H_FLAGS(%rbx)
1:      call    read_memory_map
        call    start_others
        call    banner
        rdtsc
        shlq    $32, %rdx
        orq     %rdx, %rax
        movq    %rax, H_TSC_READY(%rbx)
        movq    %rax, %r8
        xorl    %r9d, %r9d              /* what the start took is no gap */
        movq    %r9, V_MAX_GAP(%rbx)
        movq    %r9, V_MAX_GAP_AT(%rbx)
        movabsq $MAGIC, %rax
        movq    %rax, H_MAGIC(%rbx)
        jmp     beat

/* One beat; clobbers rax, rdx. A TSC that went back gives a huge unsigned gap, sorted out in new_max. */
.macro  BEAT
        rdtsc
        shlq    $32, %rdx
        orq     %rdx, %rax
        movq    %rax, %rdx
        subq    %r8, %rax
        movq    %rdx, %r8
        cmpq    %r9, %rax
        jbe     .Lbeat\@
        call    new_max
.Lbeat\@:
        incq    %r10
        movq    %r10, V_BEATS(%rbx)
        movq    %r8, V_LAST_TSC(%rbx)
.endm

        .balign 64
beat:
        BEAT
        cmpq    V_DOORBELL(%rbx), %r14
        jne     doorbell
        testl   %r12d, %r12d
        jz      beat

        testb   $MODE_WALK, %r12b
        jz      1f
        call    walk_step
1:      testb   $MODE_ECHO, %r12b
        jz      beat
        call    echo_step
        jmp     beat

new_max:
        testq   %rax, %rax
        js      1f
        movq    %rax, %r9
        movq    %rax, V_MAX_GAP(%rbx)
        movq    %r8, V_MAX_GAP_AT(%rbx)
        ret
1:      incq    V_BACKWARDS(%rbx)
        ret

/* For the inside of long commands; clobbers rax, rdx. */
beat_once:
        BEAT
gap_check:
        movq    V_GAP_REQ(%rbx), %rax
        cmpq    V_GAP_ACK(%rbx), %rax
        jne     1f
        ret
1:      xorl    %r9d, %r9d
        movq    %r9, V_MAX_GAP(%rbx)
        movq    %r9, V_MAX_GAP_AT(%rbx)
        movq    %rax, V_GAP_ACK(%rbx)
        ret

/* The doorbell is read before what it announces, so a ring during the work below is seen afterwards. */
doorbell:
        movq    V_DOORBELL(%rbx), %r14
        call    gap_check
        movq    V_CMD_SEQ(%rbx), %rax
        cmpq    V_DONE_SEQ(%rbx), %rax
        je      beat
        pushq   %rax
        xorl    %eax, %eax
        movq    %rax, V_RESULT0(%rbx)
        movq    %rax, V_RESULT1(%rbx)
        movq    %rax, V_PROGRESS(%rbx)
        movq    V_CMD(%rbx), %rcx
        movl    $STATUS_UNKNOWN, %eax
        cmpq    $(commands_end - commands) / 8, %rcx
        jae     1f
        call    *commands(, %rcx, 8)
1:      movq    %rax, V_STATUS(%rbx)
        popq    V_DONE_SEQ(%rbx)
        jmp     beat

/* ---- Commands: arguments in the mailbox, status in eax ------------------------------------------------ */
cmd_nop:
        xorl    %eax, %eax
        ret

cmd_fill:
        call    pattern_start
        movl    $fill_chunk, %r15d
        jmp     each_chunk

cmd_verify:
        call    pattern_start
        movl    $verify_chunk, %r15d
        jmp     each_chunk

cmd_touch:
        movl    $touch_chunk, %r15d
        jmp     each_chunk

cmd_walk:
        movq    V_ARG0(%rbx), %rsi
        movq    V_ARG1(%rbx), %r11
        call    span_check
        jne     1f
        andl    $~MODE_WALK, %r12d
        movq    %rsi, V_WALK_BASE(%rbx)
        movq    %r11, V_WALK_BYTES(%rbx)
        movq    $0, V_WALK_POS(%rbx)
        testq   %r11, %r11
        jz      1f
        orl     $MODE_WALK, %r12d
1:      ret

cmd_print:
        movl    $text_beat, %esi
        call    put_text
        movq    V_ARG0(%rbx), %rax
        call    put_decimal
        movl    $text_newline, %esi
        call    put_text
serial_status:
        xorl    %eax, %eax
        testb   $FLAG_NO_SERIAL, MAILBOX + H_FLAGS
        jz      1f
        movl    $STATUS_NO_IO, %eax
1:      ret

cmd_echo:
        andl    $~MODE_ECHO, %r12d
        cmpq    $0, V_ARG0(%rbx)
        je      1f
        orl     $MODE_ECHO, %r12d
        call    echo_step               /* so that a missing port is told at once */
        jmp     serial_status
1:      xorl    %eax, %eax
        ret

/* Parked until the next ring of the doorbell: the command counts as done at once. */
cmd_park:
        movq    $STATE_PARKED, V_STATE(%rbx)
        movq    $STATUS_OK, V_STATUS(%rbx)
        movq    8(%rsp), %rax
        movq    %rax, V_DONE_SEQ(%rbx)
1:      pause
        cmpq    V_DOORBELL(%rbx), %r14
        je      1b
        movq    $STATE_BEATING, V_STATE(%rbx)
        rdtsc                           /* the time parked is not a gap */
        shlq    $32, %rdx
        orq     %rdx, %rax
        movq    %rax, %r8
        xorl    %eax, %eax
        ret

cmd_port_in:
        pushq   V_IO_FAULTS(%rbx)
        movq    V_ARG1(%rbx), %rax
        movl    $in8, %r11d
        cmpq    $1, %rax
        je      1f
        movl    $in16, %r11d
        cmpq    $2, %rax
        je      1f
        movl    $in32, %r11d
        cmpq    $4, %rax
        jne     access_refused
1:      movq    V_ARG0(%rbx), %rdx
        xorl    %eax, %eax
        call    *%r11
        movq    %rax, V_RESULT0(%rbx)
        jmp     port_status

cmd_port_out:
        pushq   V_IO_FAULTS(%rbx)
        movq    V_ARG1(%rbx), %rax
        movl    $out8, %r11d
        cmpq    $1, %rax
        je      1f
        movl    $out16, %r11d
        cmpq    $2, %rax
        je      1f
        movl    $out32, %r11d
        cmpq    $4, %rax
        jne     access_refused
1:      movq    V_ARG0(%rbx), %rdx
        movq    V_ARG2(%rbx), %rax
        call    *%r11
port_status:
        popq    %rcx
        xorl    %eax, %eax
        cmpq    V_IO_FAULTS(%rbx), %rcx
        je      1f
        movl    $STATUS_NO_IO, %eax
1:      ret
access_refused:
        popq    %rcx
refused:
        movl    $STATUS_RANGE, %eax
        ret

cmd_load:
        movq    V_ARG0(%rbx), %rdi
        movq    V_ARG1(%rbx), %rcx
        xorl    %eax, %eax
        cmpq    $8, %rcx
        je      8f
        cmpq    $4, %rcx
        je      4f
        cmpq    $2, %rcx
        je      2f
        cmpq    $1, %rcx
        jne     refused
        movb    (%rdi), %al
        jmp     9f
2:      movw    (%rdi), %ax
        jmp     9f
4:      movl    (%rdi), %eax
        jmp     9f
8:      movq    (%rdi), %rax
9:      movq    %rax, V_RESULT0(%rbx)
        xorl    %eax, %eax
        ret

cmd_store:
        movq    V_ARG0(%rbx), %rdi
        movq    V_ARG1(%rbx), %rcx
        movq    V_ARG2(%rbx), %rax
        cmpq    $8, %rcx
        je      8f
        cmpq    $4, %rcx
        je      4f
        cmpq    $2, %rcx
        je      2f
        cmpq    $1, %rcx
        jne     refused
        movb    %al, (%rdi)
        jmp     9f
2:      movw    %ax, (%rdi)
        jmp     9f
4:      movl    %eax, (%rdi)
        jmp     9f
8:      movq    %rax, (%rdi)
9:      xorl    %eax, %eax
        ret

/* ---- Long commands: r15 is called for every piece, rdi address, rcx bytes; it leaves rdi behind it ---- */

/* rsi offset, r11 bytes -> ZF and eax 0 if they are whole words inside usable RAM, else eax STATUS_RANGE. */
span_check:
        movl    $STATUS_RANGE, %eax
        movq    %rsi, %rdx
        addq    %r11, %rdx
        jc      1f
        cmpq    %rdx, MAILBOX + H_USABLE
        jb      1f
        movq    %rsi, %rdx
        orq     %r11, %rdx
        testb   $7, %dl
        jnz     1f
        xorl    %eax, %eax
1:      testl   %eax, %eax
        ret

each_chunk:
        movq    V_ARG0(%rbx), %rsi
        movq    V_ARG1(%rbx), %r11
        call    span_check
        je      1f
        ret
1:      pushq   $MAILBOX + H_RANGE
next_range:
        testq   %r11, %r11
        jz      4f
        movq    (%rsp), %rdx
        addq    $16, (%rsp)
        movq    8(%rdx), %rcx
        cmpq    %rcx, %rsi
        jb      2f
        subq    %rcx, %rsi
        jmp     next_range
2:      movq    (%rdx), %rdi
        addq    %rsi, %rdi
        subq    %rsi, %rcx
        xorl    %esi, %esi
        cmpq    %r11, %rcx
        cmova   %r11, %rcx
        subq    %rcx, %r11
        addq    %rdi, %rcx
        pushq   %rcx                    /* where this piece of RAM ends */
3:      movl    %edi, %eax
        andl    $CHUNK - 1, %eax
        movl    $CHUNK, %ecx
        subl    %eax, %ecx
        movq    (%rsp), %rdx
        subq    %rdi, %rdx
        cmpq    %rdx, %rcx
        cmova   %rdx, %rcx
        pushq   %rcx
        call    *%r15
        popq    %rcx
        addq    %rcx, V_PROGRESS(%rbx)
        call    beat_once
        cmpq    (%rsp), %rdi
        jb      3b
        popq    %rax
        jmp     next_range
4:      popq    %rax
        xorl    %eax, %eax
        ret

/* rbp: what the seed adds, r13: step of one word, rsi: step of one byte. */
pattern_start:
        movabsq $PATTERN_SEED, %rbp
        imulq   V_ARG2(%rbx), %rbp
        movabsq $PATTERN_BASE, %rax
        addq    %rax, %rbp
        movabsq $PATTERN_STEP, %rax
        leaq    (, %rax, 8), %r13
        ret

.macro  PATTERN_AT_RDI                  /* rax = x of the word at rdi; rcx becomes the end */
        movabsq $PATTERN_STEP, %rax
        imulq   %rdi, %rax
        addq    %rbp, %rax
        addq    %rdi, %rcx
.endm

fill_chunk:
        PATTERN_AT_RDI
        .balign 16
1:      movq    %rax, %rdx
        shrq    $32, %rdx
        xorq    %rax, %rdx
        movq    %rdx, (%rdi)
        addq    %r13, %rax
        addq    $8, %rdi
        cmpq    %rcx, %rdi
        jb      1b
        ret

verify_chunk:
        PATTERN_AT_RDI
        .balign 16
1:      movq    %rax, %rdx
        shrq    $32, %rdx
        xorq    %rax, %rdx
        cmpq    %rdx, (%rdi)
        jne     3f
2:      addq    %r13, %rax
        addq    $8, %rdi
        cmpq    %rcx, %rdi
        jb      1b
        ret
3:      cmpq    $0, V_RESULT0(%rbx)
        jne     4f
        movq    %rdi, V_RESULT1(%rbx)
4:      incq    V_RESULT0(%rbx)
        jmp     2b

touch_chunk:
        addq    %rdi, %rcx
        andq    $-4096, %rdi
1:      lock orb $0, (%rdi)
        incq    V_RESULT0(%rbx)
        addq    $4096, %rdi
        cmpq    %rcx, %rdi
        jb      1b
        movq    %rcx, %rdi
        ret

walk_step:
        movq    V_WALK_BASE(%rbx), %rsi
        movq    V_WALK_POS(%rbx), %rax
        addq    %rax, %rsi
        addq    $4096, %rax
        cmpq    V_WALK_BYTES(%rbx), %rax
        jb      1f
        xorl    %eax, %eax
1:      movq    %rax, V_WALK_POS(%rbx)
        movl    $MAILBOX + H_RANGE, %edx
2:      movq    8(%rdx), %rcx
        cmpq    %rcx, %rsi
        jb      3f
        subq    %rcx, %rsi
        addl    $16, %edx
        jmp     2b
3:      addq    (%rdx), %rsi
        lock orb $0, (%rsi)
        incq    V_WALKED(%rbx)
        ret

/* ---- Serial port -------------------------------------------------------------------------------------- */
echo_step:
        movl    $COM1_LSR, %edx
        call    in8
        cmpb    $0xff, %al              /* nobody there */
        je      no_serial
        testb   $1, %al
        jz      1f
        movl    $COM1, %edx
        call    in8
        call    put_char
        incq    V_ECHOED(%rbx)
1:      ret
no_serial:
        andl    $~MODE_ECHO, %r12d
        lock orq $FLAG_NO_SERIAL, MAILBOX + H_FLAGS
        ret

/* al: the character. Clobbers rax, rcx, rdx, r11. */
put_char:
        testb   $FLAG_NO_SERIAL, MAILBOX + H_FLAGS
        jnz     3f
        movzbl  %al, %r11d
        pushq   $LSR_POLLS
1:      movl    $COM1_LSR, %edx
        call    in8
        cmpb    $0xff, %al
        je      4f
        testb   $0x20, %al
        jnz     2f
        decq    (%rsp)
        jnz     1b
2:      popq    %rax
        movl    %r11d, %eax
        movl    $COM1, %edx
        call    out8
        jmp     beat_once
3:      ret
4:      popq    %rax
        jmp     no_serial

/* rsi: text, ends with 0. */
put_text:
        movb    (%rsi), %al
        testb   %al, %al
        jz      1f
        call    put_char
        incq    %rsi
        jmp     put_text
1:      ret

/* rax: the number. */
put_decimal:
        subq    $24, %rsp
        leaq    23(%rsp), %rsi
        movb    $0, (%rsi)
        movl    $10, %ecx
1:      xorl    %edx, %edx
        divq    %rcx
        addb    $'0', %dl
        decq    %rsi
        movb    %dl, (%rsi)
        testq   %rax, %rax
        jnz     1b
        call    put_text
        addq    $24, %rsp
        ret

/*
 * The only port accesses. Each routine begins with its access, so that on #GP rsp points at the return
 * address; the handler comes back at port_io_failed. rcx and rdx are lost there, as sysexitq takes them.
 */
port_io_start:
in8:    inb     %dx, %al
        ret
in16:   inw     %dx, %ax
        ret
in32:   inl     %dx, %eax
        ret
out8:   outb    %al, %dx
        ret
out16:  outw    %ax, %dx
        ret
out32:  outl    %eax, %dx
        ret
port_io_end:
port_io_failed:
        incq    V_IO_FAULTS(%rbx)
        movl    $0xffffffff, %eax
        ret

/* ---- Start-up of the boot processor, ring 3 ----------------------------------------------------------- */

/* Usable RAM: what the memory map calls RAM, from FILL_BASE up to MAPPED_GIB, in whole pages. */
read_memory_map:
        movl    start_info, %eax
        cmpl    $1, START_VERSION(%rax)
        jb      9f                      /* version 0 has no memory map */
        movq    START_MEMMAP(%rax), %rsi
        movl    START_ENTRIES(%rax), %ebp
        movl    $MAILBOX + H_RANGE, %r15d
        testq   %rsi, %rsi
        jz      9f
1:      subl    $1, %ebp
        js      9f
        movq    0(%rsi), %rdi           /* address */
        movq    8(%rsi), %rcx           /* size */
        cmpl    $MEMMAP_RAM, 16(%rsi)
        leaq    24(%rsi), %rsi
        jne     1b
        addq    %rdi, %rcx
        addq    $4095, %rdi
        andq    $-4096, %rdi
        andq    $-4096, %rcx            /* end */
        cmpq    $FILL_BASE, %rdi
        jae     2f
        movl    $FILL_BASE, %edi
2:      movabsq $MAPPED_GIB << 30, %rax
        cmpq    %rax, %rcx
        jbe     3f
        movq    %rax, %rcx
        orq     $FLAG_RAM_CUT, H_FLAGS(%rbx)
3:      cmpq    %rcx, %rdi
        jae     1b
        cmpq    $MAX_RANGES, H_RANGES(%rbx)
        jb      4f
        orq     $FLAG_RAM_CUT, H_FLAGS(%rbx)
        jmp     1b
4:      call    map_range
        subq    %rdi, %rcx
        movq    %rdi, 0(%r15)
        movq    %rcx, 8(%r15)
        addl    $16, %r15d
        addq    %rcx, H_USABLE(%rbx)
        incq    H_RANGES(%rbx)
        jmp     1b
9:      ret

/* rdi start, rcx end: gives every GiB of it above the static 4 a page directory. Clobbers rax, rdx, r11, r13. */
map_range:
        movq    %rdi, %r11
        shrq    $30, %r11
        cmpl    $4, %r11d
        jae     1f
        movl    $4, %r11d
1:      movq    %r11, %rax
        shlq    $30, %rax
        cmpq    %rcx, %rax
        jae     3f
        cmpq    $0, PDPT(, %r11, 8)
        jne     2f
        leal    -4(%r11), %r13d
        shll    $12, %r13d
        addl    $page_directories, %r13d
        orq     $0xe7, %rax             /* P, RW, US, A, D, PS */
        xorl    %edx, %edx
4:      movq    %rax, (%r13, %rdx, 8)
        addq    $0x200000, %rax
        incl    %edx
        cmpl    $512, %edx
        jb      4b
        orl     $0x27, %r13d            /* P, RW, US, A */
        movq    %r13, PDPT(, %r11, 8)
2:      incl    %r11d
        jmp     1b
3:      ret

/* INIT-SIPI-SIPI to all others, then wait: for cpus=N, or until nobody new came for a while. */
start_others:
        cmpl    $0, have_lapic
        jne     1f
        lock orq $FLAG_NO_LAPIC, H_FLAGS(%rbx)
        ret
1:      call    cpus_option             /* r15: number, 0 if none */
        cmpq    $1, %r15
        je      9f
        movl    $trampoline, %esi
        movl    $TRAMPOLINE, %edi
        movl    $trampoline_end - trampoline, %ecx
        rep movsb
        movl    $LAPIC, %ebp
        movl    $0x1ff, LAPIC_SVR(%rbp) /* enabled; spurious vector, never delivered */
        movl    $ICR_INIT_OTHERS, LAPIC_ICR(%rbp)
        call    init_wait
        movl    $ICR_SIPI_OTHERS, LAPIC_ICR(%rbp)
        call    init_wait
        movl    $ICR_SIPI_OTHERS, LAPIC_ICR(%rbp)
        movl    $QUIET_TSC, %r13d
        testq   %r15, %r15
        jz      2f
        movl    $1, %r13d
        shlq    $NAMED_WAIT_SHIFT, %r13
2:      movq    H_STARTED(%rbx), %r11   /* how many there were at time rdi */
        call    now
        movq    %rax, %rdi
3:      pause
        movq    H_STARTED(%rbx), %rsi
        cmpq    %r15, %rsi
        je      9f
        cmpq    %r11, %rsi
        jne     2b
        call    now
        subq    %rdi, %rax
        cmpq    %r13, %rax
        jb      3b
9:      ret

init_wait:
        call    now
        movq    %rax, %rdi
1:      pause
        call    now
        subq    %rdi, %rax
        cmpq    $INIT_WAIT_TSC, %rax
        jb      1b
        ret

now:    rdtsc
        shlq    $32, %rdx
        orq     %rdx, %rax
        ret

/* r15 = N of "cpus=N" on the command line, or 0. */
cpus_option:
        xorl    %r15d, %r15d
        movl    start_info, %esi
        movl    START_CMDLINE(%rsi), %esi
        testl   %esi, %esi
        jz      3f
1:      cmpb    $0, (%rsi)
        je      3f
        incl    %esi
        cmpl    $0x73757063, -1(%rsi)   /* "cpus" */
        jne     1b
        cmpb    $'=', 3(%rsi)
        jne     1b
        addl    $4, %esi
2:      movzbl  (%rsi), %eax
        subl    $'0', %eax
        cmpl    $9, %eax
        ja      3f
        imull   $10, %r15d
        addl    %eax, %r15d
        incl    %esi
        jmp     2b
3:      ret

/* "cpr payload: N vcpus" on COM1, its FIFO switched on. */
banner:
        movl    $COM1_FCR, %edx
        movl    $1, %eax
        call    out8
        movl    $text_banner, %esi
        call    put_text
        movq    H_STARTED(%rbx), %rax
        call    put_decimal
        movl    $text_vcpus, %esi
        jmp     put_text

/* ---- Exception stubs, 16 bytes each, so that the IDT below is made of plain numbers ------------------- */
        .section .stubs, "ax", @progbits
        .set    vector, 0
        .rept   32
        .balign 16
        .if     !((1 << vector) & 0x60227d00)   /* 8, 10 to 14, 17, 21, 29, 30 bring an error code */
        pushq   $0
        .endif
        pushq   $vector
        jmp     fault
        .set    vector, vector + 1
        .endr

/* ---- Data --------------------------------------------------------------------------------------------- */
        .section .gdt, "aw", @progbits
gdt:    .quad   0
        .quad   0x00af9b000000ffff      /* 08 code, 64 bit, ring 0 */
        .quad   0x00cf93000000ffff      /* 10 data */
        .quad   0x00cffb000000ffff      /* 18 code, 32 bit, ring 3: unused, its place is given by sysexit */
        .quad   0x00cff3000000ffff      /* 20 data, ring 3 */
        .quad   0x00affb000000ffff      /* 28 code, 64 bit, ring 3 */
        .quad   0x00cff3000000ffff      /* 30 data, ring 3 */
        .quad   0
        .set    at, TSS
        .rept   MAX_VCPUS               /* 40: one TSS each */
        .word   IO_BITMAP + IO_BITMAP_BYTES - at, at & 0xffff
        .byte   (at >> 16) & 0xff, 0x89, 0, at >> 24
        .quad   0
        .set    at, at + TSS_BYTES
        .endr
gdt_end:

        .balign 16
idt:    .set    at, STUBS
        .rept   32
        .word   at & 0xffff, KERNEL_CS
        .byte   0, 0x8e
        .word   at >> 16
        .quad   0
        .set    at, at + 16
        .endr
idt_end:

gdt_pointer:
        .word   gdt_end - gdt - 1
        .quad   gdt
idt_pointer:
        .word   idt_end - idt - 1
        .quad   idt

        .balign 8
tsc_entry:
        .quad   0
start_info:
        .long   0
have_lapic:
        .long   0
user_flags:
        .long   0x3002                  /* IOPL 3, no IF */
use_iretq:
        .byte   0

text_banner:
        .asciz  "cpr payload: "
text_vcpus:
        .asciz  " vcpus\r\n"
text_beat:
        .asciz  "beat "
text_newline:
        .asciz  "\n"

        .balign 8
commands:
        .quad   cmd_nop, cmd_fill, cmd_verify, cmd_touch, cmd_walk, cmd_print, cmd_echo, cmd_park
        .quad   cmd_port_in, cmd_port_out, cmd_load, cmd_store
commands_end:

        .section .tables, "aw", @progbits
        .quad   PDPT + 0x27             /* PML4 */
        .fill   511, 8, 0
        .quad   PD0 + 0x0027, PD0 + 0x1027, PD0 + 0x2027, PD0 + 0x3027
        .fill   508, 8, 0
        .set    at, 0xe7                /* P, RW, US, A, D, PS */
        .rept   4 * 512
        .quad   at
        .set    at, at + 0x200000
        .endr

/*
 * Port I/O in ring 3 is allowed twice over: kvm_pvm runs ring 3 without IOPL and goes by the bitmap alone.
 * The byte behind the bitmap has to be there and all ones.
 */
        .section .tss, "aw", @progbits
        .set    at, 0
        .rept   MAX_VCPUS
        .fill   TSS_RSP0, 1, 0
        .quad   kernel_stacks + (at + 1) * STACK_BYTES
        .fill   TSS_IOMAP - TSS_RSP0 - 8, 1, 0
        .word   (MAX_VCPUS - at) * TSS_BYTES
        .fill   TSS_BYTES - TSS_IOMAP - 2, 1, 0
        .set    at, at + 1
        .endr
        .fill   IO_BITMAP_BYTES, 1, 0
        .byte   0xff

        .section .bss
        .balign 4096
kernel_stacks:
        .skip   MAX_VCPUS * STACK_BYTES
user_stacks:
        .skip   MAX_VCPUS * STACK_BYTES
page_directories:
        .skip   (MAPPED_GIB - 4) * 4096
