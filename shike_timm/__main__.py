"""`python -m shike_timm SCRIPT.py ...` runs a script, such as one of timm's, with the models of this package known."""
import os
import runpy
import sys


def main() -> None:
    """Run the script that the command line names, with the arguments after it."""
    if len(sys.argv) < 2 or not os.path.isfile(sys.argv[1]):
        given = f"'{sys.argv[1]}' is no script" if len(sys.argv) > 1 else 'No script was named'
        sys.exit(f'{given}: give the path of one and its arguments, python -m shike_timm validate.py --data-dir DIR.')
    del sys.argv[0]
    sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
    runpy.run_path(sys.argv[0], run_name='__main__')


if __name__ == '__main__':
    main()
