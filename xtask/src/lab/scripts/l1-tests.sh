# The command of a run of tests in L1: PROGRAM... -- ARGUMENT..., each program run with the arguments whatever becomes of
# the others, and in the end the figures that the tests noted.
programs=
while [ "$1" != -- ]; do
	programs="$programs $1"
	shift
done
shift
# A VM that is there all the time. L1's kernel was once seen to die of a breakpoint in its scheduler; the likely reason is that
# KVM patches that code when the first VM comes and when the last one goes, and an emulated CPU was in it just then.
./cpr-vmm -S -nodefaults -display none &
spare=$!
status=0
for program in $programs; do
	echo "== $program"
	./"$program" "$@" || status=$?
done
kill $spare
if [ -s "$CPR_LAB_OUT/figures" ]; then
	echo "== figures"
	cat "$CPR_LAB_OUT/figures"
fi
exit $status
