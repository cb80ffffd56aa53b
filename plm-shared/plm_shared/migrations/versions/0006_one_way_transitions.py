"""Quality and cost states move once, from pending, and then stand.

pg_temp comes last in each search_path: a temporary type of the caller's could otherwise stand in for a real one.
"""

from __future__ import annotations

from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute(
        """
        CREATE FUNCTION guard_quality_level() RETURNS trigger
        LANGUAGE plpgsql SET search_path = pg_catalog, public, pg_temp AS $$
        BEGIN
            IF TG_OP = 'INSERT' THEN
                IF NEW.quality_level <> 'pending' THEN
                    RAISE EXCEPTION 'runs_quality_level_starts_pending: a run starts as pending, not %',
                            NEW.quality_level
                        USING ERRCODE = 'check_violation', TABLE = TG_TABLE_NAME,
                              CONSTRAINT = 'runs_quality_level_starts_pending';
                END IF;
            ELSIF NEW.quality_level <> OLD.quality_level AND OLD.quality_level <> 'pending' THEN
                RAISE EXCEPTION 'runs_quality_level_once: % is final and cannot become %',
                        OLD.quality_level, NEW.quality_level
                    USING ERRCODE = 'check_violation', TABLE = TG_TABLE_NAME, CONSTRAINT = 'runs_quality_level_once';
            END IF;
            RETURN NEW;
        END
        $$
        """
    )
    op.execute(
        """
        CREATE FUNCTION guard_cost_status() RETURNS trigger
        LANGUAGE plpgsql SET search_path = pg_catalog, public, pg_temp AS $$
        BEGIN
            IF OLD.cost_status <> 'pending'
                AND (NEW.cost_status, NEW.cost_eur, NEW.pricing_version)
                    IS DISTINCT FROM (OLD.cost_status, OLD.cost_eur, OLD.pricing_version)
            THEN
                RAISE EXCEPTION '%_cost_once: the cost is % and final', TG_TABLE_NAME, OLD.cost_status
                    USING ERRCODE = 'check_violation', TABLE = TG_TABLE_NAME,
                          CONSTRAINT = TG_TABLE_NAME || '_cost_once';
            END IF;
            RETURN NEW;
        END
        $$
        """
    )
    op.execute("REVOKE ALL ON FUNCTION guard_quality_level(), guard_cost_status() FROM PUBLIC")
    op.execute(
        """
        CREATE TRIGGER guard_quality_level BEFORE INSERT OR UPDATE ON runs
            FOR EACH ROW EXECUTE FUNCTION guard_quality_level()
        """
    )
    op.execute(
        """
        CREATE TRIGGER guard_cost_status BEFORE UPDATE ON llm_calls
            FOR EACH ROW EXECUTE FUNCTION guard_cost_status()
        """
    )
    op.execute(
        """
        CREATE TRIGGER guard_cost_status BEFORE UPDATE ON connector_calls
            FOR EACH ROW EXECUTE FUNCTION guard_cost_status()
        """
    )


def downgrade() -> None:
    op.execute("DROP TRIGGER guard_cost_status ON connector_calls")
    op.execute("DROP TRIGGER guard_cost_status ON llm_calls")
    op.execute("DROP TRIGGER guard_quality_level ON runs")
    op.execute("DROP FUNCTION guard_cost_status()")
    op.execute("DROP FUNCTION guard_quality_level()")
